"""Megatron's own engine on our model: its text generation controller gives our tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from nemo_megacpp.core.releases import is_at_least
from nemo_megacpp.inference.completions import Prompt, complete
from nemo_megacpp.inference.sampling import GREEDY
from nemo_megacpp.inference.slot_batch import SlotBatch
from nemo_megacpp.runtime.workers import WorkerPool
from tests.generation import CASES, random_model

VOCAB, NEW, LENGTH = 128, 7, 20
PROMPTS = ([5, 17, 80, 2], [9], [44, 3, 3, 71, 60, 12, 7])


def _text(ids: Sequence[int]) -> str:
    return "".join(chr(0x100 + token) for token in ids)


TOKENIZER = SimpleNamespace(
    tokenize=lambda text: [ord(character) - 0x100 for character in text],
    detokenize=_text,
    bos=None,
    eod=VOCAB,
    vocab_size=VOCAB,
)
"""A character for each token; no token ends a document."""


def _engines_tokens(layout: str) -> tuple[list[list[int]], list[list[int]]]:
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import (
        InferenceWrapperConfig,
    )
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    model = random_model(CASES["AEMR"], layout)
    config = InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        params_dtype=model.config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=VOCAB,
        inference_max_requests=len(PROMPTS),
        inference_max_seq_length=LENGTH,
    )
    wrapped = GPTInferenceWrapper(model, config, StaticInferenceContext.from_config(config))
    controller = TextGenerationController(wrapped, TOKENIZER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this engine will go
        engine = StaticInferenceEngine(controller, legacy=True)
    done = engine.generate(
        prompts=[_text(prompt) for prompt in PROMPTS],
        sampling_params=SamplingParams(top_k=1, num_tokens_to_generate=NEW),
    )
    theirs = [[int(token) for token in request.generated_tokens] for request in done]
    batch = SlotBatch(model, len(PROMPTS), LENGTH, VOCAB)
    asked = [Prompt(tuple(prompt), NEW, GREEDY) for prompt in PROMPTS]
    ours, _ = complete(batch, asked, _text, None)
    return theirs, [one.tokens for one in ours]


@pytest.mark.skipif(is_at_least("0.17"), reason="the engine's configuration is another one")
@pytest.mark.parametrize("layout", ["tp=1", "tp=2,sp=false"])
def test_megatrons_static_engine_gives_our_tokens(ranks: WorkerPool, layout: str) -> None:
    world = 2 if "2" in layout else 1
    for theirs, ours in ranks.run(world, _engines_tokens, layout):
        assert theirs == ours
        assert all(len(tokens) == NEW for tokens in ours)
