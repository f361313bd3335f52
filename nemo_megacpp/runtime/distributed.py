"""Process groups: join the job, create those of a layout, or fake a world of any size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch
from megatron.core import parallel_state, tensor_parallel

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.runtime.host import ensure_host

_TIMEOUT = timedelta(minutes=5)


def start_process_group(rank: int, world_size: int, rendezvous: str) -> None:
    """Join the default process group; on a host with GPUs, use the ``rank``-th.

    Args:
        rank: of this process, on this machine.
        world_size: number of processes.
        rendezvous: an init method, such as ``file:///…`` or ``tcp://host:port``.
    """
    host = ensure_host()
    if host.device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        host.backend,
        init_method=rendezvous,
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )


def start_model_parallel(layout: ParallelLayout, seed: int = 1234) -> None:
    """Create Megatron's process groups for ``layout`` and seed its random-state tracker.

    As in Megatron, the default generator is seeded alike on all ranks of a stage.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=ensure_host().backend != "gloo",
    )
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


@contextlib.contextmanager
def fake_rank(layout: ParallelLayout, rank: int) -> Iterator[None]:
    """Be ``rank`` of ``layout``'s world while modules are built; nothing is sent.

    Torch's fake backend makes the groups: they have sizes and ranks, and their collectives do
    nothing. At the end the groups are destroyed and the random states restored.

    Raises:
        RuntimeError: the process has process groups already, which this would destroy.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if torch.distributed.is_initialized():
        raise RuntimeError("A fake world cannot be made in a process that has process groups.")
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
