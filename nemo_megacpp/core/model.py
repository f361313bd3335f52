"""Megatron's hybrid language model: its class, and how it is given pattern, stack and stage."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_megacpp.errors import UserError
from nemo_megacpp.pattern import HybridPattern

try:
    from megatron.core.models.hybrid.hybrid_model import HybridModel as CoreModel
except ImportError:  # MambaModel until 0.17
    from megatron.core.models.mamba import MambaModel as CoreModel

_MODEL = signature(CoreModel.__init__).parameters


def stage_argument(vp_stage: int | None) -> dict[str, Any]:
    """Return the keyword of Megatron's model for a virtual pipeline stage, where it has one."""
    return {"vp_stage": vp_stage} if "vp_stage" in _MODEL else {}


def model_arguments(stack: ModuleSpec, pattern: HybridPattern, chunks: int) -> dict[str, Any]:
    """Return the keywords of Megatron's model that name the stack and its pattern.

    From 0.18 on the model reads the pattern itself: it refuses letters that it does not know, and
    divides the layers over the stages. So it is given legal stand-ins, cut where ours is; the stack
    has the pattern from its own spec (:mod:`nemo_megacpp.specs.stack_spec`).

    Args:
        stack: spec of the stack.
        pattern: of the whole model.
        chunks: pipeline stages times virtual ones.
    """
    if "hybrid_stack_spec" not in _MODEL:
        return {"mamba_stack_spec": stack, "hybrid_override_pattern": str(pattern)}
    return {
        "hybrid_stack_spec": stack,
        "hybrid_layer_pattern": stand_in_pattern(pattern, chunks),
    }


def stand_in_pattern(pattern: HybridPattern, chunks: int) -> str:
    """Return a pattern of Megatron's own symbols with the depth and the cuts of ``pattern``.

    Megatron's model builds nothing of the symbols: its stack does, and the stack is ours.
    """
    cut = pattern.cut_into(chunks)
    return cut.to_megatron("hybrid_layer_pattern", cuts=True, stand_ins=True)


def only_stage(layer_type_list: Sequence[str], stages: int) -> str:
    """Return the pattern of a model whose spec carries none: the layers of its only stage.

    Raises:
        UserError: there are other stages, whose layers Megatron does not show this one.
    """
    if stages > 1:
        raise UserError(
            f"Megatron shows the stack of a pipeline stage its own layers only, here "
            f"{''.join(layer_type_list)!r}. Give the whole pattern in the spec's name, as in "
            f"--spec nemo_megacpp.specs 'hybrid_stack_spec(hybrid_pattern=AEM|R)'."
        )
    return "".join(layer_type_list)


def chunk_at(
    chunks: Sequence[range], layer_type_list: Sequence[str] | None, offset: int, ours: int
) -> range:
    """Return the layers that a stack has to build.

    Args:
        chunks: of the pattern.
        layer_type_list: the symbols that Megatron's model selected for this stack; None where the
            release leaves the division to the stack.
        offset: number of the first of them.
        ours: which chunk this stack is by its stage.

    Raises:
        UserError: the model was given other cuts than the pattern's.
    """
    if layer_type_list is None:
        return chunks[ours]
    for chunk in chunks:
        if (chunk.start, len(chunk)) == (offset, len(layer_type_list)):
            return chunk
    raise UserError(
        f"The model's layer pattern cuts out {len(layer_type_list)} layers from layer {offset} on, "
        f"and the hybrid pattern has its chunks at "
        f"{', '.join(f'{chunk.start} to {chunk.stop - 1}' for chunk in chunks)}. Give both the same"
        f" depth and cuts."
    )


def check_symbols(pattern: HybridPattern, chunk: range, layer_type_list: Sequence[str]) -> None:
    """Refuse a model whose own pattern says something else than the one that the spec carries.

    Megatron counts E blocks and FLOP/s by its own.

    Args:
        pattern: of the whole model.
        chunk: the layers of a stack.
        layer_type_list: the symbols that Megatron's model selected for it.

    Raises:
        UserError: they are not the symbols of these layers.
    """
    here = HybridPattern(pattern.families[chunk.start : chunk.stop])
    wanted = here.to_megatron("hybrid_layer_pattern", stand_ins=True)
    if wanted != "".join(layer_type_list):
        raise UserError(
            f"The model's layer pattern has {''.join(layer_type_list)!r} at layers {chunk.start} "
            f"to {chunk.stop - 1}, and the stack's is {here.letters}: give {wanted!r} there."
        )
