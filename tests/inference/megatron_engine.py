"""Megatron's static engine around one of our models, as the two releases build it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from nemo_megacpp.core.releases import is_at_least

VOCAB, LENGTH = 128, 20
NEW = 7
PROMPTS = ([5, 17, 80, 2], [9], [44, 3, 3, 71, 60, 12, 7])


def text_of(ids: Sequence[int]) -> str:
    """Return a character for each token."""
    return "".join(chr(0x100 + token) for token in ids)


TOKENIZER = SimpleNamespace(
    tokenize=lambda text: [ord(character) - 0x100 for character in text],
    detokenize=text_of,
    offsets=lambda ids, text: list(range(len(ids))),
    bos=None,
    eod=VOCAB,
    vocab_size=VOCAB,
)
"""No token ends a document."""


def static_engine(model: Any, legacy: bool = True, whole: int = -1) -> Any:
    """Return Megatron's engine; its context holds :data:`PROMPTS`.

    Args:
        model: this rank's stage.
        legacy: of the engine.
        whole: tokens of the largest batch that is not split into microbatches over PP, -1: none is
            split. From 0.17 on none is.
    """
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    if is_at_least("0.17"):
        wrapped = GPTInferenceWrapper(model, StaticInferenceContext(len(PROMPTS), LENGTH))
    else:
        from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import (
            InferenceWrapperConfig,
        )

        config = InferenceWrapperConfig(
            hidden_size=model.config.hidden_size,
            params_dtype=model.config.params_dtype,
            inference_batch_times_seqlen_threshold=whole,
            padded_vocab_size=VOCAB,
            inference_max_requests=len(PROMPTS),
            inference_max_seq_length=LENGTH,
        )
        wrapped = GPTInferenceWrapper(model, config, StaticInferenceContext.from_config(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this engine will go
        return StaticInferenceEngine(TextGenerationController(wrapped, TOKENIZER), legacy=legacy)
