"""The small model of proofs: every size different, so that no permuted axis can pass."""

from __future__ import annotations

from typing import Any

# Small, with every size different enough that a transposed or permuted axis cannot pass unseen.
_SIZES: dict[str, Any] = {
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
    return {**_SIZES, "hybrid_pattern": pattern, **changes}
