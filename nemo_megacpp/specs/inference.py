"""What the stack refuses with an inference context, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.transformer import TransformerConfig

from nemo_megacpp.errors import UserError, raise_violations
from nemo_megacpp.families import block_of
from nemo_megacpp.pattern import Family

NO_SIDE_CHANNELS = (
    "The model has side channels, whose ids come with the data: nothing says which ones a "
    "generated token has, so it cannot generate."
)


def check_inference(
    config: TransformerConfig, families: Sequence[Family], *, cp: int, side_channels: bool
) -> None:
    """Refuse a model, or a layout of it, whose layers cannot carry a sequence's state.

    Args:
        config: of the model, with its virtual stages.
        families: of its layers.
        cp: the degree.
        side_channels: whether the model has any.

    Raises:
        UserError: with every reason.
    """
    vpp = config.virtual_pipeline_model_parallel_size
    raise_violations(
        [*layout_violations(cp, vpp), *_model_violations(config, families, side_channels)]
    )


def layout_violations(cp: int, vpp: int | None) -> Iterator[str]:
    """Yield why a layout cannot generate."""
    if cp > 1:
        yield (
            f"Generation has no context parallelism, here CP={cp}: a step is one token, of which "
            f"CP={cp} ranks could have none. Load the checkpoint with cp=1."
        )
    if vpp is not None:
        yield (
            f"Generation has no virtual pipeline stages, here VPP={vpp}: they hide how long a "
            f"stage waits behind other microbatches, and a step has one. Megatron's inference "
            f"takes one chunk a rank as well. Leave vpp out."
        )


def _model_violations(
    config: TransformerConfig, families: Sequence[Family], side_channels: bool
) -> Iterator[str]:
    if config.sequence_parallel:
        yield (
            "Generation has no sequence parallelism: it divides the tokens of a step, and a step "
            "is one token. Load the checkpoint with sp=0."
        )
    if side_channels:
        yield NO_SIDE_CHANNELS
    without = [f.value for f in dict.fromkeys(families) if block_of(f).inference_state is None]
    if without:
        yield (
            f"The family of {', '.join(without)} blocks declares no inference_state, so its layers "
            f"are not known to keep one (nemo_megacpp.families.BlockFamily)."
        )


def check_context(context: Any, training: bool, packed: bool) -> None:
    """Refuse a forward pass that cannot go through an inference context.

    Raises:
        UserError: the context is Megatron's dynamic one, the model trains, or the rows are packs.
    """
    if not context.is_static_batching():
        raise UserError(
            "The hybrid stack takes Megatron's StaticInferenceContext, or a SlotContext, whose "
            "batch may change with every pass. DynamicInferenceContext keeps keys and values in "
            "blocks for flash-attn, and states of Mamba-2's shape alone, which R blocks and "
            "Mamba-3 have not."
        )
    if training:
        raise UserError("An inference context needs the model in evaluation mode: call eval().")
    if packed:
        raise UserError(
            "Packed rows have no inference context: give each document a row or a slot of its own."
        )
