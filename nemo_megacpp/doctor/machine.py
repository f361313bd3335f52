"""This machine: installed packages, GPUs and their links, backends, memory, disk."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Literal

from nemo_megacpp.bridge.versions import WANTED as BRIDGE
from nemo_megacpp.core.releases import SERIES, installed, standing_of, supported
from nemo_megacpp.doctor.topology import Topology, read_topology
from nemo_megacpp.nemo.versions import WANTED

Status = Literal["ok", "limited", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        part: name of what was checked.
        found: its version, number or place.
        status: ``ok``; ``limited``: something is slower or unavailable; ``broken``: nothing can be
            trained until it is fixed.
        cost: what the missing or broken part costs, and how to install it.
    """

    part: str
    found: str
    status: Status = "ok"
    cost: str = ""


_SPARE_DISK = 10 * 2**30
"""Bytes. A checkpoint of the tiny recipe takes 100 MB, one of NAM56R with its optimizer a hundred
times that."""


def count_gpus() -> int:
    """Return the GPUs of this machine; 0 without torch."""
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def nvlink_domain(topology: Topology | None = None) -> int:
    """Return how many of this machine's GPUs reach one another directly.

    Args:
        topology: as ``nvidia-smi`` tells it, which is asked if not given; where it tells nothing,
            or of other GPUs than this process sees, the GPUs that reach the first one over NVLink
            or PCIe are counted.
    """
    import torch

    topology = topology or read_topology()
    if topology is not None and len(topology.gpus) == torch.cuda.device_count():
        return min(map(len, topology.domains()))
    others = range(1, torch.cuda.device_count())
    return 1 + sum(torch.cuda.can_device_access_peer(0, other) for other in others)


def machine_findings(gpus: int) -> Iterator[Finding]:
    """Yield the GPUs, backends and memory of this machine, which has ``gpus`` GPUs."""
    yield from _devices(gpus)
    if importlib.util.find_spec("torch") is not None:
        yield from _backends(gpus)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("host memory", f"{memory / 2**30:.0f} GiB, {os.cpu_count()} CPUs")


def disk_finding(folder: Path) -> Finding:
    """Return the free space where a run writes."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{free / 2**30:.0f} GiB free at {there.resolve()}"
    if free < _SPARE_DISK:
        return Finding("disk", found, "limited", "few checkpoints fit; set another run_dir")
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
            "bf16 and grouped experts need 8.0",
        )
    if gpus > 1:
        yield from _links(gpus, read_topology())


def _links(gpus: int, topology: Topology | None) -> Iterator[Finding]:
    reached = nvlink_domain(topology)
    if reached == gpus:
        yield Finding("NVLink domain", f"{reached} GPUs")
    else:
        path = topology.worst_path() if topology else None
        yield Finding(
            "NVLink domain",
            f"{reached} of {gpus} GPUs",
            "limited",
            f"TP above {reached} communicates through the host"
            + (f" (path {path})" if path else "")
            + f": use tp={reached} or less",
        )
    if topology is not None and (far := topology.far_from_a_nic()):
        cost = "traffic between nodes goes through a CPU: slower CP, EP, PP and DP across nodes"
        found = f"behind a CPU for {', '.join(far)}"
        yield Finding("network interfaces", found, "limited", cost)


def _backends(gpus: int) -> Iterator[Finding]:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_gloo_available():
        yield Finding("gloo", "yes")
    else:
        yield Finding(
            "gloo", "absent", "broken", "ranks cannot communicate: use another build of torch"
        )
    if gpus == 0:
        yield Finding("NCCL", "not needed without a GPU")
    elif torch.distributed.is_nccl_available():
        yield Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding(
            "NCCL", "absent", "broken", "GPUs cannot communicate: use another build of torch"
        )


_CORE = "pip install 'nemo_megacpp[core]'"
_NEMO = "pip install 'nemo_megacpp[nemo]'"
_GPU = "pip install 'nemo_megacpp[gpu]'"
_NO_BRIDGE = "no train; verify and Megatron-LM's scripts still work. See docs/bridge.md"
_NO_NEMO = f"no train, no verify, no nemo llm pretrain; Megatron-LM's scripts still work. {_NEMO}"


@dataclass(frozen=True)
class _Package:
    """A distribution.

    Attributes:
        name: of the distribution.
        cost: what is missing without it.
        series: the versions that this package supports; None for any.
        required: nothing can be trained without it.
        gpu: it matters only where there is a GPU.
        world: the series of Megatron-Core beside which it matters; None: beside each.
    """

    name: str
    cost: str
    series: str | None = None
    required: bool = False
    gpu: bool = False
    world: str | None = None


_NEMO_WORLD, _BRIDGE_WORLD = SERIES


_PACKAGES = (
    _Package("torch", "nothing runs. Install the build for your GPUs, or a CPU one", required=True),
    _Package("megatron-core", f"nothing runs. {_CORE}", required=True),
    _Package("einops", f"Megatron's Mamba layers do not import. {_CORE}", required=True),
    _Package("psutil", "saving a checkpoint hangs forever. pip install psutil", required=True),
    _Package("nemo-toolkit", _NO_NEMO, WANTED["nemo-toolkit"], world=_NEMO_WORLD),
    _Package("nemo_run", _NO_NEMO, world=_NEMO_WORLD),
    _Package("nvidia-modelopt", f"NeMo hides llm.pretrain. {_NEMO}", world=_NEMO_WORLD),
    _Package("nvidia-resiliency-ext", f"NeMo cannot write checkpoints. {_NEMO}", world=_NEMO_WORLD),
    _Package("megatron-bridge", _NO_BRIDGE, BRIDGE["megatron-bridge"], world=_BRIDGE_WORLD),
    _Package("transformers", _NO_BRIDGE, world=_BRIDGE_WORLD),
    _Package("triton", f"NeMo's state-space models do not import, and no Triton kernels. {_NEMO}"),
    _Package("tensorboard", f"no TensorBoard files. {_NEMO}"),
    _Package("wandb", "wandb_project is refused; TensorBoard still works. pip install wandb"),
    _Package(
        "transformer-engine",
        f"plain torch modules instead: slower, no FP8. {_GPU}",
        gpu=True,
    ),
    _Package("mamba-ssm", f"M blocks only as mamba3 in plain torch, much slower. {_GPU}", gpu=True),
    _Package("causal-conv1d", f"M blocks only as mamba3. {_GPU}", gpu=True),
)


def package_findings(gpus: int) -> Iterator[Finding]:
    """Yield one finding per package, Python first, for a machine with ``gpus`` GPUs."""
    yield Finding("python", platform.python_version())
    core = installed()
    for package in _PACKAGES:
        if package.world is None or core is None or core.series == package.world:
            yield _finding(package, gpus)
    yield _index_builder()
    if core is None or core.series == _NEMO_WORLD:
        yield _entry_point()


def _finding(package: _Package, gpus: int) -> Finding:
    try:
        found = version(package.name)
    except PackageNotFoundError:
        if package.gpu and gpus == 0:
            return Finding(package.name, "not needed without a GPU")
        return Finding(
            package.name, "absent", "broken" if package.required else "limited", package.cost
        )
    if package.name == "megatron-core":
        return _core_finding(found, package.cost)
    if package.series is not None and not found.startswith(f"{package.series}."):
        return Finding(
            package.name,
            found,
            "broken" if package.required else "limited",
            f"not {package.series}: {package.cost}",
        )
    return Finding(package.name, found)


def _core_finding(found: str, cost: str) -> Finding:
    standing = standing_of(found)
    if standing == "proved":
        return Finding("megatron-core", found)
    if standing == "tried":
        return Finding("megatron-core", f"{found}, not proved ({supported()})")
    return Finding("megatron-core", found, "broken", f"{supported()}: {cost}")


def _index_builder() -> Finding:
    part = "dataset index builder"
    try:
        compiled = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    except ModuleNotFoundError as error:
        if error.name == "megatron":
            return Finding(part, "absent", "limited", "comes with megatron-core")
        return _import_failure(error)
    except Exception as error:  # whatever the libraries under Megatron raise at their import
        return _import_failure(error)
    if compiled:
        return Finding(part, "compiled")
    return Finding(
        part, "source", "limited", "Megatron compiles it at start: needs make, g++ and pybind11"
    )


def _import_failure(error: Exception) -> Finding:
    reason = str(error) or type(error).__name__
    return Finding("megatron.core", "does not load", "broken", f"nothing runs: {reason}")


def _entry_point() -> Finding:
    part = "NeMo entry point"
    for point in entry_points(group="nemo_run.cli"):
        if point.value == "nemo_megacpp.nemo.factories":
            return Finding(part, point.name)
    return Finding(
        part, "absent", "limited", "nemo llm pretrain does not list the recipes: pip install ."
    )
