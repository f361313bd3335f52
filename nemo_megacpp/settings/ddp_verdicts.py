"""Verdicts on ``DistributedDataParallelConfig``."""

from __future__ import annotations

from nemo_megacpp.settings.verdict import Table, neutral, only_with, proved, refused

_FSDP = "The stack is trained by Megatron's DDP; no case has its FSDP"


def _covering(*fields: str) -> tuple[str, ...]:
    return tuple(f"covering:DistributedDataParallelConfig.{field}" for field in fields)


DDP: Table = {
    "grad_reduce_in_fp32": proved(
        "The type in which gradients are summed; a bf16 model accepts True only",
        "tests/proof/test_verify.py::test_a_recipe_verified",
    ),
    "overlap_grad_reduce": proved("When gradients are summed", *_covering("overlap_grad_reduce")),
    "overlap_param_gather": proved(
        "When parameters are gathered", *_covering("overlap_param_gather")
    ),
    "align_param_gather": neutral("Whether stages gather parameters at the same time"),
    "use_distributed_optimizer": proved(
        "Which rank keeps which optimizer state", *_covering("use_distributed_optimizer")
    ),
    "num_distributed_optimizer_instances": refused(
        "No case compares several instances, and checkpoints know one"
    ),
    "bucket_size": proved("How many gradients go in one message", *_covering("bucket_size")),
    "pad_buckets_for_high_nccl_busbw": neutral("Pads a message with numbers that nobody reads"),
    "check_for_nan_in_grad": neutral("Ends a run whose gradients are NaN or Inf"),
    "check_for_large_grads": neutral("Ends a run whose gradients are unexpectedly large"),
    "reduce_scatter_with_fp32_accumulation": neutral(
        "Adds the same float32 gradients in another order"
    ),
    "average_in_collective": neutral(
        "Divides after the sum instead of before, for experts too: rounding; NCCL alone can"
    ),
    "nccl_ub": neutral("Where NCCL finds the buffers"),
    "disable_symmetric_registration": neutral("How NCCL learns where the buffers are"),
    "delay_wgrad_compute": refused("Only Megatron's GPTModel has a schedule for it"),
    "fp8_param_gather": refused("It needs fp8, which is refused"),
    "reuse_grad_buf_for_mxfp8_param_ag": refused("It needs fp8, which is refused"),
    "use_megatron_fsdp": refused(_FSDP),
    "use_custom_fsdp": refused(_FSDP),
    "data_parallel_sharding_strategy": refused(_FSDP),
    "outer_dp_sharding_strategy": refused(_FSDP),
    "gradient_reduce_div_fusion": only_with("use_megatron_fsdp"),
    "suggested_communication_unit_size": only_with("use_megatron_fsdp"),
    "preserve_fp32_weights": only_with("use_megatron_fsdp"),
    "keep_fp8_transpose_cache": only_with("use_megatron_fsdp"),
    "fsdp_double_buffer": only_with("use_megatron_fsdp"),
    "fsdp_manual_registration": only_with("use_megatron_fsdp"),
}
