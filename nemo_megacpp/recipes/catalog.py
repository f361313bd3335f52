"""The named recipes, as plain data: Megatron's field names, nothing computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nemo_megacpp.layout import ParallelLayout

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
class Training:
    """Settings of a run, apart from model and layout.

    Attributes:
        max_steps: optimizer steps of the whole run; also the length of the learning-rate schedule.
        stop_after: save and stop after this step, leaving the rest of the run to a resume.
        micro_batch_size: rows of ``seq_length`` tokens in a forward pass.
        global_batch_size: rows in an optimizer step.
        packed_documents: attention, M and R, and positions, start anew at each document of a row,
            and the end of a document predicts nothing; else they run across. Megatron's
            ``reset_attention_mask``, ``reset_position_ids`` and ``eod_mask_loss``, and the states.
        lr: peak learning rate of a cosine schedule.
        min_lr: final learning rate.
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW weight decay.
        clip_grad: bound on the gradient's norm.
        adam_beta2: AdamW beta2.
        precision: ``fp32`` or ``bf16``.
        val_check_interval: steps between evaluations on held-out data.
        limit_val_batches: global batches per evaluation.
        save_interval: steps between checkpoints.
        async_save: write checkpoints in the background, while the training goes on.
        keep_last: newest checkpoints to keep; None: all.
        keep_every: checkpoints of multiples of this step are kept as well.
        log_interval: steps between progress lines.
        seed: seed of weights and data order.
        use_distributed_optimizer: shard optimizer state over data-parallel ranks.
        verify_checkpoint: compare every byte of a checkpoint with its manifest before it is loaded.
        tensorboard: write TensorBoard files.
        wandb_project: Weights & Biases project to log to; None: it is not used.
        wandb_name: name of the run in Weights & Biases; None: the run folder's.
        use_pytorch_profiler: write a torch.profiler trace of some steps to RUN/profile.
        profile_step_start: steps that are complete when the trace begins.
        profile_step_end: steps that are complete when the trace ends.
        profile_ranks: global ranks that write a trace.
    """

    max_steps: int = 1000
    stop_after: int | None = None
    micro_batch_size: int = 1
    global_batch_size: int = 8
    packed_documents: bool = False
    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    adam_beta2: float = 0.95
    precision: str = "bf16"
    val_check_interval: int = 100
    limit_val_batches: int = 8
    save_interval: int = 500
    async_save: bool = False
    keep_last: int | None = None
    keep_every: int | None = None
    log_interval: int = 10
    seed: int = 1234
    use_distributed_optimizer: bool = False
    verify_checkpoint: bool = True
    tensorboard: bool = True
    wandb_project: str | None = None
    wandb_name: str | None = None
    use_pytorch_profiler: bool = False
    profile_step_start: int = 10
    profile_step_end: int = 12
    profile_ranks: list[int] = field(default_factory=lambda: [0])


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
