"""The small models of proofs: one for the test suite, and one in the proportions of a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.settings.combinations import with_modules_of
from nemo_megacpp.side_channels import read_side_channels

# Every size different, so that a transposed or permuted axis cannot pass unseen.
_TINY: dict[str, Any] = {
    "hidden_size": 48,
    "ffn_hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 6,
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "mamba_state_dim": 10,
    "mamba_num_groups": 4,
    "m2rnn_num_heads": 12,
    "m2rnn_key_head_dim": 5,
    "m2rnn_value_head_dim": 4,
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 20,
    "moe_shared_expert_intermediate_size": 12,
    "moe_router_topk": 2,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "moe_token_dispatcher_type": "alltoall",
    "vocab_size": 118,
    "make_vocab_size_divisible_by": 32,
    "seq_length": 16,
}


def tiny_model(pattern: str, **changes: Any) -> dict[str, Any]:
    """Return fields of a small ``HybridConfig`` with ``pattern``."""
    return {**_TINY, "hybrid_pattern": pattern, **changes}


DRAWN: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_input_jitter_eps": None,
        "moe_router_force_load_balancing": False,
    }
)
"""Settings that make each rank draw random numbers of its own, and the values that turn them off: a
correct layout draws other numbers than one rank."""
_DIVIDED = ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "ffn_hidden_size")
_DEEP = 16
_MOST_ROWS = 48
"""Ids of a side channel."""


def proxy_model(
    model: Mapping[str, Any], layout: ParallelLayout, narrowest: Mapping[str, int]
) -> dict[str, Any]:
    """Return fields of a small ``HybridConfig`` with the proportions that ``layout`` splits, and
    without what :data:`DRAWN` names.

    Counts (heads, groups, experts, layers) decide which layouts are legal and are not changed.
    Widths are reduced; one that a layout divides keeps its factors of two.

    Args:
        model: fields of the recipe's ``HybridConfig``, with ``m2rnn_num_heads`` given.
        layout: the layout to prove; the sequence is long enough for it.
        narrowest: the widths to reduce to (:mod:`nemo_megacpp.proof.case_kernels`).
    """
    small = {
        name: min(narrowest[name], value) if name in narrowest else value
        for name, value in model.items()
    }
    for name in _DIVIDED:
        if small.get(name):
            small[name] = math.gcd(small[name], 64)
    small |= {name: value for name, value in DRAWN.items() if name in small}
    small["vocab_size"] = 250
    small["make_vocab_size_divisible_by"] = math.lcm(16, layout.tp)
    small["seq_length"] = _tokens_of_a_rank(model) * layout.tp * layout.cp
    small["num_layers"] = _depth(model, layout.chunks_count)
    if model.get("side_channels"):
        small["side_channels"] = _small_channels(small, layout.tp)
    return small


def _small_channels(small: Mapping[str, Any], tp: int) -> list[dict[str, Any]]:
    """Return side channels of fewer ids; those of layers that ``small`` lacks get its last one."""
    found = []
    for channel in read_side_channels(small["side_channels"]):
        rows, owner = channel.vocab_size, channel.owner
        if rows > _MOST_ROWS:
            rows = math.lcm(_MOST_ROWS, tp) if channel.partition == "vocabulary" else _MOST_ROWS
        if not isinstance(owner, str):
            owner = tuple(sorted({min(layer, small["num_layers"] - 1) for layer in owner}))
        width = channel.width and min(channel.width, small["hidden_size"])
        found.append(asdict(replace(channel, vocab_size=rows, owner=owner, width=width)))
    return found


def _tokens_of_a_rank(model: Mapping[str, Any]) -> int:
    """Return a number of tokens whose routing scores fill whole vectors of 32.

    Megatron's router computes a float32 sigmoid whatever the model is, and torch rounds the
    remainder beyond whole vectors differently: the eighth digit would depend on a token's place.
    """
    experts = model.get("num_moe_experts") or 32
    return max(8, 32 // math.gcd(experts, 32))


def _depth(model: Mapping[str, Any], chunks: int) -> int:
    """Return the least depth that holds the unit, or two where a state goes from one R block to the
    next, and cuts as the recipe's depth does."""
    depth = model["num_layers"]
    unit = HybridPattern.parse(model["hybrid_pattern"])
    if unit.cuts or depth <= _DEEP:
        return depth
    least = len(unit) * (2 if model.get("m2rnn_depth_state") else 1)
    return next((d for d in range(least, depth) if d % chunks == 0), depth)


def one_family(small: Mapping[str, Any], letter: str, layout: ParallelLayout) -> dict[str, Any]:
    """Return ``small`` with layers of one family only, one to a pipeline chunk."""
    alone = {**small, "hybrid_pattern": letter, "num_layers": layout.chunks_count}
    if small.get("side_channels"):
        alone["side_channels"] = _small_channels(alone, layout.tp)
    return with_modules_of(alone, letter)


def every_expert(small: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``small`` with every token sent to all experts, and none dropped.

    The choice of the top k is discontinuous: rounding to bfloat16 can send a token to another
    expert in a correct layout. Float64 and float32 prove the choice.
    """
    return {
        **small,
        "moe_router_topk": small.get("num_moe_experts") or small.get("moe_router_topk", 1),
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_expert_capacity_factor": None,
    }
