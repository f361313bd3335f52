"""The parameters that the optimizer steps: of a bfloat16 parameter its float32 main parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import shard_buffer

from nemo_megacpp.proof.checks import tensor_difference
from nemo_megacpp.proof.gather import GlobalValues, gather_values


def gather_parameters(
    chunks: Sequence[torch.nn.Module], wrapped: Sequence[DistributedDataParallel]
) -> GlobalValues | None:
    """Gather every saved tensor after a step to rank 0: of a bfloat16 parameter the main parameter.

    The replicas of a main parameter include its bfloat16 copies: ``replica_spread`` has, under
    ``KEY in bfloat16``, how far one of them is from the rounded main parameter.

    Args:
        chunks: this rank's model chunks, unwrapped.
        wrapped: the same in Megatron's data-parallel wrapper, after the optimizer's step.
    """
    main = {id(parameter): whole for parameter, whole in _main_parameters(wrapped)}
    gathered = gather_values(chunks, lambda tensor: main.get(id(tensor), tensor))
    copies = gather_values(chunks, lambda tensor: tensor if id(tensor) in main else None)
    if gathered is None or copies is None:
        return None
    for key, copy in copies.values.items():
        rounded = torch.from_numpy(gathered.values[key]).bfloat16().float().numpy()
        apart = [tensor_difference(rounded, copy), copies.replica_spread.get(key, 0.0)]
        gathered.replica_spread[f"{key} in bfloat16"] = float(np.max(apart))
    return gathered


def _main_parameters(
    wrapped: Sequence[DistributedDataParallel],
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Yield every parameter that has a main parameter, and that in the parameter's shape."""
    for chunk in wrapped:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            if buffer.param_dtype != torch.bfloat16:
                continue  # the optimizer steps the parameter itself
            for bucket in buffer.buckets:
                if chunk.ddp_config.use_distributed_optimizer:
                    yield from _gather_shards(buffer, bucket)
                else:
                    yield from ((parameter, parameter.main_param) for parameter in bucket.params)


def _gather_shards(buffer: Any, bucket: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Gather the main parameters of a bucket, of which each data-parallel rank has stepped the part
    that lies in its shard of the bucket. Elements that no rank has stepped are NaN."""
    group, size = buffer.data_parallel_group, bucket.grad_data.numel()
    whole = torch.full((size,), np.nan, dtype=torch.float32, device=bucket.grad_data.device)
    shard = shard_buffer(whole, group.size())[group.rank()].clone()
    first = bucket.offset + group.rank() * shard.numel()
    for parameter in bucket.params:
        start, end, _ = buffer.param_index_map[parameter]
        low, high = max(start, first), min(end, first + shard.numel())
        if low < high:
            shard[low - first : high - first] = parameter.main_param
    torch.distributed.all_gather_into_tensor(whole, shard, group=group)
    for parameter in bucket.params:
        start, end, _ = buffer.param_index_map[parameter]
        main = whole[start - bucket.offset : end - bucket.offset]
        yield parameter, main.view(parameter.shape)
