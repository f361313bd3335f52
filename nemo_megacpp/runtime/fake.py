"""A place in a world that does not exist: process groups of any size, in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core import parallel_state, tensor_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.host import ensure_host


@contextlib.contextmanager
def fake_rank(layout: ParallelLayout, rank: int) -> Iterator[None]:
    """Be ``rank`` of ``layout``'s world while modules are built; nothing is ever sent.

    Torch's fake backend makes the groups; they have sizes and ranks, and their collectives do
    nothing. Afterwards the process is as it was: without process groups, random states as before.

    Raises:
        RuntimeError: the process already has process groups, which this would end.
    """
    if torch.distributed.is_initialized():
        raise RuntimeError("A fake world cannot be entered from within a process group.")
    ensure_host()
    random_state, tracker = torch.get_rng_state(), tensor_parallel.get_cuda_rng_tracker()
    tracked = tracker.get_states()
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=layout.world
    )
    try:
        start_model_parallel(layout)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        torch.set_rng_state(random_state)
        tensor_parallel.get_cuda_rng_tracker().set_states(tracked)
