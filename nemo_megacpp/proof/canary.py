"""A recipe's model, small: the same counts and divisibility, narrow matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.pattern import HybridPattern

# What is counted (heads, groups, experts, layers) decides which layouts are legal and stays as it
# is. What is only wide is narrowed; a width that a layout divides keeps its factors of two.
_NARROW = {
    "hidden_size": 64,
    "ffn_hidden_size": 64,
    "kv_channels": 4,
    "mamba_head_dim": 4,
    "mamba_state_dim": 8,
    "m2rnn_key_head_dim": 8,
    "m2rnn_value_head_dim": 2,
}
_DIVIDED = ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
_DEEP = 16


def canary(model: Mapping[str, Any], layout: ParallelLayout) -> dict[str, Any]:
    """Return fields of a small ``HybridConfig`` with the proportions that ``layout`` splits.

    Args:
        model: fields of the recipe's ``HybridConfig``, with ``m2rnn_num_heads`` given.
        layout: the layout to be tried; the sequence is long enough for it.
    """
    small = {
        name: min(_NARROW.get(name, value), value) if name in _NARROW else value
        for name, value in model.items()
    }
    for name in _DIVIDED:
        if small.get(name):
            small[name] = math.gcd(small[name], 64)
    small["vocab_size"] = 250
    small["make_vocab_size_divisible_by"] = math.lcm(16, layout.tp)
    small["seq_length"] = 8 * layout.tp * layout.cp
    small["num_layers"] = _depth(model, layout.chunks_count)
    return small


def _depth(model: Mapping[str, Any], chunks: int) -> int:
    """Return the least depth that holds the unit and cuts as the recipe's depth does."""
    depth = model["num_layers"]
    unit = HybridPattern.parse(model["hybrid_pattern"])
    if unit.cuts or depth <= _DEEP:
        return depth
    return next((d for d in range(len(unit), depth) if d % chunks == 0), depth)


def one_family(small: Mapping[str, Any], letter: str, layout: ParallelLayout) -> dict[str, Any]:
    """Return ``small`` with layers of one family only, one to a pipeline chunk."""
    return {**small, "hybrid_pattern": letter, "num_layers": layout.chunks_count}
