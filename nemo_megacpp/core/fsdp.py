"""Megatron's FSDP: on which releases it is there in the form that is proved."""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallelConfig

STRATEGIES = ("optim", "optim_grads", "optim_grads_params")
"""``data_parallel_sharding_strategy``: what its ranks share besides the optimizer's state."""


def problem_with_fsdp() -> str | None:
    """Return why Megatron's FSDP is refused on the imported release, None where it is proved."""
    if hasattr(DistributedDataParallelConfig, "megatron_fsdp_main_params_dtype"):
        return None
    return (
        "Megatron-Core 0.16 finds the tensor-parallel weights by Transformer Engine's classes, so "
        "no proof without a GPU can run it; 0.19 is proved"
    )
