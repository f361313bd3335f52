"""The machine: GPUs and how they are joined, backends, kernels, memory, disk."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_megacpp.doctor.finding import Finding

_SPARE_DISK = 10 * 2**30
"""Bytes. A checkpoint of the tiny recipe takes 100 MB, one of NAM56R with its optimizer a hundred
times that."""


def count_gpus() -> int:
    """Return the GPUs of this machine; 0 without torch."""
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def nvlink_domain() -> int:
    """Return how many of this machine's GPUs reach the first one directly, itself included."""
    import torch

    others = range(1, torch.cuda.device_count())
    return 1 + sum(torch.cuda.can_device_access_peer(0, other) for other in others)


def machine_findings(gpus: int) -> Iterator[Finding]:
    """Yield what the machine has, apart from packages.

    Args:
        gpus: on this machine.
    """
    yield from _devices(gpus)
    if importlib.util.find_spec("torch") is not None:
        yield from _backends(gpus)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("host memory", f"{memory / 2**30:.0f} GiB, {os.cpu_count()} CPUs")


def disk_finding(folder: Path) -> Finding:
    """Return the free space where a run would write."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{free / 2**30:.0f} GiB free at {there.resolve()}"
    if free < _SPARE_DISK:
        return Finding("disk", found, "limited", "few checkpoints fit; give another run_dir")
    return Finding("disk", found)


def _devices(gpus: int) -> Iterator[Finding]:
    if gpus == 0:
        yield Finding(
            "GPUs", "none", "limited", "training on CPU ranks over gloo: for tests and tiny recipes"
        )
        return
    import torch

    first = torch.cuda.get_device_properties(0)
    yield Finding("GPUs", f"{gpus} x {first.name}, {first.total_memory / 2**30:.0f} GiB")
    if first.major < 8:
        yield Finding(
            "compute capability",
            f"{first.major}.{first.minor}",
            "limited",
            "bf16 and grouped experts want 8.0",
        )
    if gpus > 1:
        reached = nvlink_domain()
        if reached == gpus:
            yield Finding("NVLink domain", f"{reached} GPUs")
        else:
            yield Finding(
                "NVLink domain",
                f"{reached} of {gpus} GPUs",
                "limited",
                f"TP above {reached} goes through the host: keep tp at or below it",
            )


def _backends(gpus: int) -> Iterator[Finding]:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_gloo_available():
        yield Finding("gloo", "yes")
    else:
        yield Finding("gloo", "absent", "broken", "ranks cannot speak: another build of torch")
    if gpus == 0:
        yield Finding("NCCL", "not needed without a GPU")
    elif torch.distributed.is_nccl_available():
        yield Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("NCCL", "absent", "broken", "GPUs cannot speak: another build of torch")
