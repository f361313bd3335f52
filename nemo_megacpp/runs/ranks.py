"""What all ranks of a run measured of themselves."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from nemo_megacpp.runtime.host import current_host


def memory_now() -> int:
    """Return the bytes of this rank's tensors on the device, or of its process on a CPU."""
    if current_host().device == "cuda":
        return torch.cuda.memory_allocated()
    resident = Path("/proc/self/statm").read_text().split()[1]
    return int(resident) * resource.getpagesize()


def over_ranks(before: int, seconds: float) -> dict[str, float]:
    """Return what all ranks measured. A collective over all ranks.

    ``memory`` is the largest peak of any rank, and ``memory_added`` the largest above ``before``,
    in bytes: of the device's tensors, or of the process on a CPU. ``seconds_fastest`` and
    ``seconds_slowest`` are the least and the most ``seconds`` of any rank.
    """
    device = torch.cuda.current_device()
    if current_host().device == "cuda":
        here = torch.cuda.max_memory_allocated()
    else:
        here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    measured = [here, here - before, -seconds, seconds]
    most = torch.tensor(measured, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    memory, added, fastest, slowest = most.tolist()
    return {
        "memory": memory,
        "memory_added": added,
        "seconds_fastest": -fastest,
        "seconds_slowest": slowest,
    }
