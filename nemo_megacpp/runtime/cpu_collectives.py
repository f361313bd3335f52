"""Coalesced collectives of Megatron's buffers, one by one.

On gloo a coalesced gather corrupts tensors of several dtypes, which a later chunk's parameters are,
and an asynchronous one now and then the heap (torch 2.13: a process that does nothing else dies
within some hundred thousand of them). Collectives that are started one after another do neither,
and compute the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d


class _Works:
    """What ``torch.distributed._coalescing_manager`` yields: works to wait for."""

    def __init__(self) -> None:
        self.works: list[Any] = []

    def wait(self) -> None:
        """Wait for all of them."""
        for work in self.works:
            work.wait()


@contextlib.contextmanager
def one_by_one(
    group: torch.distributed.ProcessGroup | None = None,
    device: torch.device | None = None,
    async_ops: bool = False,
) -> Iterator[_Works]:
    """Start each collective by itself when the context ends; otherwise as
    ``torch.distributed._coalescing_manager``, which records them in the same place."""
    group = group or torch.distributed.group.WORLD
    recorded: dict[Any, list[Any]] = c10d._world.pg_coalesce_state
    recorded.setdefault(group, [])
    works = _Works()
    try:
        yield works
    finally:
        operations = recorded.pop(group)
    options = {"group": group, "async_op": True}
    for one in operations:
        if one.dst_tensor is None:
            works.works.append(one.op(one.tensor, one.redop, **options))
        elif one.redop is None:
            works.works.append(one.op(one.dst_tensor, one.tensor, **options))
        else:
            works.works.append(one.op(one.dst_tensor, one.tensor, one.redop, **options))
    if not async_ops:
        works.wait()
