"""Coalesced collectives on gloo, one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import distributed
from torch.distributed import ReduceOp

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.cpu_collectives import one_by_one
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def _collectives(async_ops: bool) -> list[list[Any]]:
    """Gather, reduce-scatter and all-reduce tensors of three dtypes over two ranks."""
    start_model_parallel(ParallelLayout.parse("world=2"))
    group = parallel_state.get_data_parallel_group()
    here = group.rank()
    whole = [torch.full((2 * size,), -1.0, dtype=DTYPES[size - 3]) for size in (3, 4, 5)]
    shards = [part.chunk(2)[here] for part in whole]
    for shard in shards:
        shard.fill_(here + 1)
    with one_by_one(group, async_ops=async_ops) as works:
        for part, shard in zip(whole, shards, strict=True):
            distributed.all_gather_into_tensor(part, shard, group=group, async_op=async_ops)
    if async_ops:
        works.wait()
    halves = [part.clone().chunk(2)[0] for part in whole]
    with one_by_one(group, async_ops=async_ops) as works:
        for part, half in zip(whole, halves, strict=True):
            distributed.reduce_scatter_tensor(half, part, ReduceOp.SUM, group, async_ops)
    if async_ops:
        works.wait()
    largest = [torch.full((2,), 10.0 * here, dtype=kind) for kind in DTYPES]
    with one_by_one(group, async_ops=async_ops) as works:
        for part in largest:
            distributed.all_reduce(part, ReduceOp.MAX, group, async_ops)
    if async_ops:
        works.wait()
    return [[part.tolist() for part in found] for found in (whole, halves, largest)]


@pytest.mark.parametrize("async_ops", [False, True])
def test_each_gives_its_own_result(ranks: WorkerPool, async_ops: bool) -> None:
    for rank, (whole, halves, largest) in enumerate(ranks.run(2, _collectives, async_ops)):
        assert whole == [[1.0] * size + [2.0] * size for size in (3, 4, 5)]
        assert halves == [[2.0 * (rank + 1)] * size for size in (3, 4, 5)]
        assert largest == [[10.0, 10.0]] * 3
