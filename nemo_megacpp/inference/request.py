"""What a checkpoint is asked to complete: validated before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemo_megacpp.checkpoint.content import CheckpointContent, saved_shape
from nemo_megacpp.checkpoint.identity import Identity, saved_model
from nemo_megacpp.data.checkpoint_tokenizer import find_tokenizer
from nemo_megacpp.data.tokenizer import LoadedTokenizer
from nemo_megacpp.errors import UserError, raise_violations
from nemo_megacpp.inference.completions import Prompt
from nemo_megacpp.inference.sampling import Sampling
from nemo_megacpp.layout import ParallelLayout, validate_layout
from nemo_megacpp.pattern import Family
from nemo_megacpp.specs.inference import NO_SIDE_CHANNELS, layout_violations

Dtype = Literal["float32", "bfloat16", "float64"]

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
MOST_SLOTS = 16
"""Sequences at once, where it is not asked for."""
DEFAULT_NEW_TOKENS = 64
"""As far as the model's positions allow."""
_TRAINING_ONLY: dict[str, Any] = {
    "moe_expert_capacity_factor": None,
    "moe_pad_expert_input_to_capacity": False,
    "moe_input_jitter_eps": None,
    "moe_router_force_load_balancing": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": None,
    "apply_rope_fusion": False,
}
"""Fields of a model that drop tokens, draw numbers or serve the backward pass, and their values in
generation; the fused RoPE has one position for a whole batch."""


@dataclass(frozen=True)
class Request:
    """Prompts, and the model that completes them.

    Attributes:
        checkpoint: of any kind.
        model: fields of an identity.
        layout: of the ranks.
        dtype: of parameters and activations.
        tokenizer: its folder.
        texts: of the prompts.
        prompts: their tokens.
        slots: sequences at once.
    """

    checkpoint: Path
    model: Mapping[str, Any]
    layout: ParallelLayout
    dtype: Dtype
    tokenizer: Path
    texts: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    slots: int

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(prompt.tokens) + prompt.max_new_tokens for prompt in self.prompts)


def generation_layout(
    text: str, content: CheckpointContent, model: Mapping[str, Any]
) -> ParallelLayout:
    """Read a layout and validate that the model generates in it: over TP, EP and PP, without
    SP.

    Raises:
        UserError: every reason why it cannot.
    """
    layout = ParallelLayout.parse(text)
    channels = [NO_SIDE_CHANNELS] if model.get("side_channels") else []
    reasons = layout_violations(layout.cp, layout.vpp)
    raise_violations([*reasons, *channels])
    identity: Identity = {"model": dict(model), "tokenizer": None, "step": 0}
    # With SP, which the rules ask of a layout that trains.
    validate_layout(layout, saved_shape(content.directory, identity))
    return dataclasses.replace(layout, sequence_parallel=False)


def read_prompts(
    texts: Sequence[str],
    tokenizer: LoadedTokenizer,
    content: CheckpointContent,
    model: Mapping[str, Any],
    max_new_tokens: int | None,
    sampling: Sampling,
    stop: Sequence[str],
) -> tuple[Prompt, ...]:
    """Return the tokens of prompts; each has the seed after that of the one before.

    Args:
        texts: the prompts.
        tokenizer: of the model.
        content: the checkpoint.
        model: its fields.
        max_new_tokens: None for `DEFAULT_NEW_TOKENS`, or fewer where the positions end.
        sampling: of the first prompt.
        stop: strings that end a completion.

    Raises:
        UserError: a prompt is empty, or too long for the positions that the model knows.
    """
    identity: Identity = {"model": dict(model), "tokenizer": None, "step": 0}
    fields, pattern = saved_model(content.directory, identity)
    positions: int | None = None
    if Family.ATTENTION in pattern.families and fields["position_embedding_type"] == "rope":
        positions = fields["seq_length"]
    prompts = []
    for number, tokens in enumerate(tokenizer.encode(texts)):
        name = f"Prompt {number + 1}" if len(texts) > 1 else "The prompt"
        if not tokens:
            raise UserError(f"{name} is empty; a completion begins after at least one token.")
        new = DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        if positions is not None:
            left = positions - len(tokens)
            if left < (1 if max_new_tokens is None else new):
                raise UserError(
                    f"{name} has {len(tokens):,} tokens, and with {new:,} new ones it would be "
                    f"{len(tokens) + new:,} long: the model's A blocks know {positions:,} "
                    f"positions (seq_length, with RoPE). Give fewer, or a model without A blocks."
                )
            new = min(new, left)
        own = dataclasses.replace(sampling, seed=sampling.seed + number)
        prompts.append(Prompt(tuple(tokens), new, own, tuple(stop)))
    return tuple(prompts)


def saved_dtype(content: CheckpointContent, precision: str | None) -> Any:
    """Return ``precision`` as torch names it; None: the dtype of most of the saved weights."""
    if precision is not None:
        return _DTYPES[precision]
    dtypes = [info.dtype for info in content.model_tensors.values()]
    return "bfloat16" if dtypes.count("bfloat16") > len(dtypes) / 2 else "float32"


def model_that_generates(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a saved model without what it had for training alone."""
    return {**model, **{name: _TRAINING_ONLY[name] for name in _TRAINING_ONLY if name in model}}


def make_request(
    content: CheckpointContent,
    texts: Sequence[str],
    sampling: Sampling,
    *,
    model: Mapping[str, Any] | None = None,
    layout: str = "tp=1",
    tokenizer: Path | None = None,
    near: Sequence[Path] = (),
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    slots: int | None = None,
    precision: str | None = None,
) -> Request:
    """Return a validated request.

    Args:
        content: the checkpoint.
        texts: the prompts.
        sampling: of the first prompt.
        model: fields of the model; the checkpoint's own if not given.
        layout: degrees of tp, ep, etp and pp.
        tokenizer, near: see :func:`nemo_megacpp.data.checkpoint_tokenizer.find_tokenizer`.
        max_new_tokens, stop: see :func:`read_prompts`.
        slots: sequences at once; None: all, at most 16.
        precision: ``fp32`` or ``bf16``; None: that of the saved weights.

    Raises:
        UserError: what cannot be read, does not fit together, or cannot generate.
    """
    model = model_that_generates(own_model(content) if model is None else model)
    degrees = generation_layout(layout, content, model)
    found = find_tokenizer(content, int(model.get("vocab_size", 0)), tokenizer, near)
    prompts = read_prompts(texts, found, content, model, max_new_tokens, sampling, stop)
    return Request(
        content.directory,
        model,
        degrees,
        saved_dtype(content, precision),
        found.folder,
        tuple(texts),
        prompts,
        min(len(texts), slots or MOST_SLOTS),
    )


def own_model(content: CheckpointContent) -> dict[str, Any]:
    """Return the fields of the model that a checkpoint says it holds.

    Raises:
        UserError: it does not say so, or code of its user would have to run.
    """
    if content.identity is None:
        raise UserError(
            f"{content.directory} does not say which model it holds (it has no nemo_megacpp.json): "
            f"give --recipe NAME, or a YAML file of the recipe."
        )
    model = content.identity["model"]
    if modules := model.get("family_modules"):
        raise UserError(
            f"The model of {content.directory} has families of {', '.join(modules)}, and no code "
            f"is run that a checkpoint names. Give --recipe with a recipe that names them."
        )
    return model
