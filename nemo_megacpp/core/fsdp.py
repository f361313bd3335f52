"""Megatron's FSDP: on which releases it is there in the form that is proved, and its buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
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


def problem_with_saving() -> str | None:
    """Return why Megatron cannot save a checkpoint of FSDP with the Adam that it has, None where it
    can. Its save has collectives for each parameter that the optimizer has a state of."""
    from megatron.core.optimizer import Adam
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # Transformer Engine's makes a state of every parameter; the no-GPU host marks that it does too.
    stood_in = hasattr(DistributedOptimizer.sharded_param_state_fsdp_dtensor, "state_of_all")
    if stood_in or Adam.__module__.startswith("transformer_engine"):
        return None
    return (
        f"the Adam of {Adam.__module__.partition('.')[0]} has no state of a parameter of which a "
        f"rank has no element, and the ranks would wait for each other for ever"
    )


class FsdpBuffer(NamedTuple):
    """Parameters that FSDP lays out, gathers and reduces together.

    Attributes:
        is_expert: sharded over the expert-data-parallel group, instead of dp-cp.
        element_size: bytes of a parameter's element.
        numel: elements of the whole buffer, with the padding that divides it among the ranks.
        ranges: first and last-plus-one element of each parameter, in order.
    """

    is_expert: bool
    element_size: int
    numel: int
    ranges: tuple[tuple[int, int], ...]


def fsdp_buffers(
    chunk: torch.nn.Module,
    strategy: str,
    bucket_size: int | None,
    replicas: int,
    expert_replicas: int,
) -> Iterator[FsdpBuffer]:
    """Yield the buffers that FSDP would make for a model, by its own rules.

    ``ParamAndGradBuffer`` (``megatron_fsdp/param_and_grad_buffer.py``) groups and places the
    parameters with the two functions that are called here; neither needs process groups.

    Args:
        chunk: the model of a rank, which may be on the meta device.
        strategy: one of `STRATEGIES`.
        bucket_size: elements after which a buffer is closed, but for those of a layer; None: never.
        replicas, expert_replicas: ranks that share a dense and an expert buffer.
    """
    from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import (
        BucketingPolicy,
        _get_parameter_groups,
        build_data_parallel_buffer_index,
    )
    from megatron.core.ssm.mamba_layer import MambaLayer
    from megatron.core.transformer.transformer_layer import TransformerLayer

    # As mcore_fsdp_adapter.FullyShardedDataParallel sets it; its third unit is a TransformerLayer.
    units = [TransformerLayer, MambaLayer] if strategy == "optim_grads_params" else []
    policy = BucketingPolicy(bucket_size, units, strategy)  # type: ignore[arg-type]
    ddp = DistributedDataParallelConfig(data_parallel_sharding_strategy=strategy)
    for group in _get_parameter_groups(chunk, policy, {})[0]:
        ranks = expert_replicas if group.is_expert_param else replicas
        items, bucket, _ = build_data_parallel_buffer_index(
            [parameter.shape for parameter in group.params],
            data_parallel_rank=0,
            data_parallel_world_size=ranks,
            is_data_distributed=ranks > 1,
            ddp_config=ddp,
            chunk_size_factor=group.chunk_size_factor,
        )
        ranges = ((i.global_data_index, i.global_data_index + i.size) for i in items.values())
        yield FsdpBuffer(
            group.is_expert_param,
            group.params[0].element_size(),
            bucket.size,
            tuple(sorted(ranges)),
        )
