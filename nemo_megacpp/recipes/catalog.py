"""The named recipes, as plain data: Megatron's field names, nothing computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.recipes.training import Training

_EXPERT_ROUTING: dict[str, Any] = {
    "moe_router_topk": 4,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 1e-3,
    "moe_token_dispatcher_type": "alltoall",
    "moe_grouped_gemm": True,
}

NAM56R_MODEL: dict[str, Any] = {
    "hybrid_pattern": "AEMEAEMEAEMR",
    "num_layers": 52,
    "hidden_size": 3584,
    "ffn_hidden_size": 18944,
    "num_attention_heads": 56,
    "num_query_groups": 8,
    "kv_channels": 64,
    "rotary_base": 500000,
    "vocab_size": 65536,
    "seq_length": 4096,
    "num_moe_experts": 16,
    "moe_ffn_hidden_size": 896,
    "moe_shared_expert_intermediate_size": 1024,
    "mamba_num_heads": 56,
    "mamba_head_dim": 64,
    "mamba_state_dim": 64,
    "mamba_num_groups": 8,
    "m2rnn_num_heads": 224,
    "m2rnn_key_head_dim": 64,
    "m2rnn_value_head_dim": 16,
    **_EXPERT_ROUTING,
}

# One sixteenth of NAM56R's width, with its ratios: 7 query heads to a KV head, 7 Mamba heads to a
# group, an expert a quarter and the shared expert two sevenths of the hidden size, four rows of
# recurrent state to a column, N·V = hidden size. 28 heads and 4 groups divide by 2 and 4.
NAM56R_TINY_MODEL: dict[str, Any] = {
    **NAM56R_MODEL,
    "num_layers": 12,
    "hidden_size": 224,
    "ffn_hidden_size": 1184,
    "num_attention_heads": 28,
    "num_query_groups": 4,
    "kv_channels": 8,
    "rotary_base": 10000,
    "vocab_size": 2048,
    "seq_length": 256,
    "moe_ffn_hidden_size": 56,
    "moe_shared_expert_intermediate_size": 64,
    "mamba_num_heads": 28,
    "mamba_head_dim": 8,
    "mamba_state_dim": 16,
    "mamba_num_groups": 4,
    "m2rnn_num_heads": 28,
    "m2rnn_key_head_dim": 32,
    "m2rnn_value_head_dim": 8,
}


# The articles name NAM52 without its dimensions. Assumed: the family's sibling without a recurrent
# tail, NAM56R with each R turned into an E: AEME tiled to 52 layers (13 A, 26 E, 13 M), which four
# pipeline stages divide alike, and everything else NAM56R's.
NAM52_MODEL: dict[str, Any] = {**NAM56R_MODEL, "hybrid_pattern": "AEME"}


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe of the catalogue."""

    summary: str
    model: dict[str, Any] = field(hash=False)
    layout: ParallelLayout
    training: Training


CATALOG: dict[str, NamedRecipe] = {
    "nam56r": NamedRecipe(
        "NAM56R at full size: 52 layers, hidden 3584, TP=2 with SP, bf16",
        NAM56R_MODEL,
        ParallelLayout(
            tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=1
        ),
        Training(max_steps=100_000, warmup_steps=2000, global_batch_size=256, seed=1234),
    ),
    "nam56r_tiny": NamedRecipe(
        "one AEMEAEMEAEMR of NAM56R's proportions, hidden 224, for two CPU ranks, float32",
        NAM56R_TINY_MODEL,
        ParallelLayout(
            tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=1
        ),
        Training(
            max_steps=160,
            micro_batch_size=4,
            global_batch_size=8,
            lr=4e-3,
            min_lr=4e-4,
            warmup_steps=20,
            weight_decay=0.01,
            precision="fp32",
            val_check_interval=20,
            limit_val_batches=4,
            save_interval=80,
        ),
    ),
}

CATALOG["nam52"] = replace(
    CATALOG["nam56r"],
    summary="NAM52, assumed: NAM56R without R; 52 layers of AEME, hidden 3584, TP=2 with SP, bf16",
    model=NAM52_MODEL,
)

# Mamba-3's heads are together twice as wide as the hidden size (mamba_ssm's expand=2).
for _name, _heads, _what in (
    ("nam56r", 112, "112 heads; TP=2 with SP, bf16"),
    ("nam52", 112, "112 heads; TP=2 with SP, bf16"),
    ("nam56r_tiny", 56, "56 heads; two CPU ranks, float32"),
):
    CATALOG[f"{_name}_mamba3"] = replace(
        CATALOG[_name],
        summary=f"{_name} with Mamba-3 in its M blocks: {_what}",
        model={**CATALOG[_name].model, "mode": "mamba3", "mamba_num_heads": _heads},
    )
