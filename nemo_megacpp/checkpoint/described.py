"""Layout and model as a checkpoint describes them, read from the objects that train."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from nemo_megacpp.checkpoint.identity import STRUCTURE
from nemo_megacpp.config import ACTIVATIONS, HybridConfig
from nemo_megacpp.layout import ParallelLayout

# fmt: off
COMPUTED = (
    "activation_func", "activation_func_clamp_value", "attention_output_gate",
    "glu_linear_offset", "layernorm_epsilon", "layernorm_zero_centered_gamma",
    "moe_apply_probs_on_input", "moe_expert_capacity_factor", "moe_router_dtype",
    "moe_router_group_topk", "moe_router_num_groups", "moe_router_pre_softmax",
    "moe_router_score_function", "moe_router_topk", "moe_router_topk_scaling_factor",
    "position_embedding_type", "rotary_base", "rotary_percent", "seq_length", "softmax_scale",
)
"""Settings that decide what a model computes from its tensors: whoever exports or generates reads
them. They may change between two runs from one checkpoint."""
# fmt: on


def actual_layout(degrees: Any, ranks: int) -> ParallelLayout:
    """Return the layout of ``degrees``, an object with Megatron's fields, on ``ranks`` ranks."""
    names = [f.name for f in dataclasses.fields(ParallelLayout) if f.name != "world_size"]
    layout = ParallelLayout(**{name: getattr(degrees, name) for name in names})
    return layout if layout.world == ranks else dataclasses.replace(layout, world_size=ranks)


def actual_model(config: HybridConfig, names: Iterable[str]) -> dict[str, Any]:
    """Return the model's fields that a checkpoint records.

    Args:
        config: of the model.
        names: the fields that its recipe gave; those that decide a tensor's shape, and what the
            model computes, are added.
    """
    decisive = {*STRUCTURE, *COMPUTED, "hybrid_pattern", "side_channels"}
    model = {name: getattr(config, name) for name in {*names, *decisive}}
    return {**model, "activation_func": _activation(model["activation_func"])}


def _activation(function: Any) -> str:
    """Return the name of an activation: a checkpoint's description holds no functions."""
    names = (name for name, known in ACTIVATIONS.items() if known is function)
    return next(names, getattr(function, "__name__", str(function)))
