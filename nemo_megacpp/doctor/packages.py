"""Installed packages: versions, and what each is for."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

from nemo_megacpp.doctor.finding import Finding
from nemo_megacpp.nemo.versions import WANTED

_CORE = "pip install 'nemo_megacpp[core]'"
_NEMO = "pip install 'nemo_megacpp[nemo]'"
_GPU = "pip install 'nemo_megacpp[gpu]'"
_NO_NEMO = (
    f"no nemo-megacpp train, no nemo llm pretrain; Megatron-LM's scripts and verify stay. {_NEMO}"
)


@dataclass(frozen=True)
class _Package:
    """A distribution, and the price of its absence.

    Attributes:
        name: of the distribution.
        cost: of being without it.
        series: which the package is written for; None: any.
        required: nothing can be trained without it.
        gpu: it matters only where there is a GPU.
    """

    name: str
    cost: str
    series: str | None = None
    required: bool = False
    gpu: bool = False


_PACKAGES = (
    _Package("torch", "nothing runs. Install the build for your GPUs, or a CPU one", required=True),
    _Package("megatron-core", f"nothing runs. {_CORE}", WANTED["megatron-core"], required=True),
    _Package("einops", f"Megatron's Mamba layers do not import. {_CORE}", required=True),
    _Package("psutil", "saving a checkpoint hangs for ever. pip install psutil", required=True),
    _Package("nemo-toolkit", _NO_NEMO, WANTED["nemo-toolkit"]),
    _Package("nemo_run", _NO_NEMO),
    _Package("nvidia-modelopt", f"NeMo hides llm.pretrain. {_NEMO}"),
    _Package("nvidia-resiliency-ext", f"NeMo cannot write checkpoints. {_NEMO}"),
    _Package("triton", f"NeMo's state-space models do not import, and no Triton kernels. {_NEMO}"),
    _Package("tensorboard", f"no TensorBoard files. {_NEMO}"),
    _Package("wandb", "wandb_project is refused; TensorBoard stays. pip install wandb"),
    _Package(
        "transformer-engine",
        f"plain torch modules in its place: slower, no FP8. {_GPU}",
        gpu=True,
    ),
    _Package("mamba-ssm", f"no M blocks but mamba3 in plain torch, much slower. {_GPU}", gpu=True),
    _Package("causal-conv1d", f"no M blocks but mamba3. {_GPU}", gpu=True),
)


def package_findings(gpus: int) -> Iterator[Finding]:
    """Yield one finding per package, Python first.

    Args:
        gpus: on this machine.
    """
    yield Finding("python", platform.python_version())
    for package in _PACKAGES:
        yield _finding(package, gpus)
    yield _index_builder()
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
    if package.series is not None and not found.startswith(f"{package.series}."):
        return Finding(
            package.name,
            found,
            "broken" if package.required else "limited",
            f"not {package.series}: {package.cost}",
        )
    return Finding(package.name, found)


def _index_builder() -> Finding:
    part = "dataset index builder"
    try:
        compiled = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    except ModuleNotFoundError as error:
        if error.name == "megatron":
            return Finding(part, "absent", "limited", "comes with megatron-core")
        return _not_loading(error)
    except Exception as error:  # whatever the libraries under Megatron raise at their import
        return _not_loading(error)
    if compiled:
        return Finding(part, "compiled")
    return Finding(
        part, "source", "limited", "Megatron compiles it at start: wants make, g++ and pybind11"
    )


def _not_loading(error: Exception) -> Finding:
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
