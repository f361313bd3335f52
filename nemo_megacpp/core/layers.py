"""Keywords and attributes of Megatron's layers and of its Mamba mixer."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from inspect import signature
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)

_MAMBA_LAYER = signature(MambaLayer.__init__).parameters
_TRANSFORMER_LAYER = signature(TransformerLayer.__init__).parameters
_PACK = {field.name for field in dataclasses.fields(PackedSeqParams)}

PACK_NUMBERS_DOCUMENTS = "seq_idx" in _PACK
"""Whether the Mamba mixer reads the number of each token's document from the pack (0.17 on), and
not from a method of its own."""


def layer_number_arguments(
    config: Any, layer_number: int, vp_stage: int | None, pp_rank: int, depth: int | None = None
) -> dict[str, Any]:
    """Return the keywords that give a ``TransformerLayer`` its number in the whole model, or inside
    a prediction depth the number of the depth.

    By that number Megatron's router logs: it adds ``num_layers`` to it, and has as many places
    beyond them as there are depths, however many layers each has.

    The layer adds an offset that assumes equal stages. From 0.17 on it can be told not to; before,
    the offset is taken off first, so that the sum is the number whatever the cuts are.
    """
    if depth is not None:
        return {"layer_number": depth, "add_layer_offset": False, "is_mtp_layer": True}
    if "add_layer_offset" in _TRANSFORMER_LAYER:
        return {"layer_number": layer_number, "add_layer_offset": False}
    offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
    return {"layer_number": layer_number - offset}


def mamba_layer_arguments(residual_in_fp32: bool) -> dict[str, Any]:
    """Return the keywords of ``MambaLayer`` for the dtype of its residual; from 0.17 on the layer
    reads ``fp32_residual_connection`` of the configuration instead."""
    if "residual_in_fp32" in _MAMBA_LAYER:
        return {"residual_in_fp32": residual_in_fp32}
    return {}


def mlp_spec(submodules: MLPSubmodules) -> Any:
    """Return the spec of Megatron's ``MLP`` as a part of a ``TransformerLayer``, which from 0.18 on
    is a callable that takes the layer's process groups."""
    if hasattr(MLP, "as_mlp_submodule"):
        return partial(MLP.as_mlp_submodule, submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def residual_of(layer: MambaLayer, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the residual of a ``MambaLayer`` in the dtype in which it is added."""
    wide = getattr(layer, "residual_in_fp32", None)
    if wide is None:
        wide = layer.config.fp32_residual_connection
    return hidden_states.float() if wide else hidden_states


def convolution_modules(mixer: MambaMixer) -> tuple[torch.nn.Module, ...]:
    """Return the modules whose parameters the Mamba mixer reads without calling them: its
    ``conv1d``. From 0.19 on the mixer owns these parameters itself, under the same checkpoint
    keys."""
    convolution = getattr(mixer, "conv1d", None)
    return () if convolution is None else (convolution,)


def with_documents(packed: PackedSeqParams, documents: torch.Tensor) -> PackedSeqParams:
    """Return a pack that tells the Mamba mixer the document of each token.

    Where :data:`PACK_NUMBERS_DOCUMENTS`, a pack without ``total_tokens`` has no ``seq_idx``, and
    Mamba's state would leak from each document into the next without an error.

    Args:
        packed: as the stack takes it.
        documents: int32 ``[1, s]``.
    """
    known: Any = copy.copy(packed)
    known.seq_idx = documents
    return known
