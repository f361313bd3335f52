"""What Megatron-LM's own training scripts need beyond :mod:`cpu_megatron` to run without a GPU.

A script checks before it starts that there is a CUDA device, its capability and its used memory.
Here the calls return what it needs to start; the rest of the package reads
:func:`nemo_megacpp.runtime.host.current_host`, which still returns ``cpu``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from types import SimpleNamespace
from typing import Any

import torch

_HELPERS = "megatron.core.datasets.helpers_cpp"
_FSDP = "--use-megatron-fsdp"
_CAPABILITY = (8, 0)
"""Megatron's argument check needs 8.0 for grouped experts; no computation depends on it."""


def _returns(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _describe_a_device() -> None:
    cuda: Any = torch.cuda
    cuda.is_available = _returns(True)
    # One per rank of this node: Megatron starts its process groups only where it sees a device.
    cuda.device_count = _returns(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    cuda.get_device_capability = _returns(_CAPABILITY)
    cuda.get_device_name = _returns("no GPU")
    cuda.get_device_properties = _returns(
        SimpleNamespace(
            name="no GPU",
            major=_CAPABILITY[0],
            minor=_CAPABILITY[1],
            total_memory=0,
            multi_processor_count=0,
        )
    )
    for name in (
        "device_memory_used",
        "max_memory_allocated",
        "max_memory_reserved",
        "memory_allocated",
        "memory_reserved",
    ):
        setattr(cuda, name, _returns(0))
    cuda.memory_stats = lambda device=None: defaultdict(int)
    cuda.empty_cache = _returns(None)
    cuda.reset_peak_memory_stats = _returns(None)
    cuda.nvtx.range_push = _returns(0)
    cuda.nvtx.range_pop = _returns(0)
    # A data loader asks it, and would pin memory with the driver of a CUDA build of torch.
    accelerator: Any = torch.accelerator
    accelerator.is_available = _returns(False)


def _on_gloo(init_process_group: Callable[..., None]) -> Callable[..., None]:
    """Stock scripts use NCCL, and bind it to a device."""

    def init(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        init_process_group("fake" if backend == "fake" else "gloo", *args, **kwargs)

    return init


def _use_compiled_helpers() -> None:
    """Give a source checkout the index builder that the installed Megatron-Core was built with.

    A checkout has only its C++ source and would call make, which needs pybind11's headers; without
    a compiled one anywhere it still does.
    """
    if importlib.util.find_spec(_HELPERS) is None and not _load_installed_helpers():
        return
    from megatron.core.datasets import utils

    datasets: Any = utils
    datasets.compile_helpers = _returns(None)


def _load_installed_helpers() -> bool:
    try:
        installed = files("megatron-core") or []
    except PackageNotFoundError:
        return False
    for file in installed:
        if file.name.startswith("helpers_cpp.") and file.suffix == ".so":
            spec = importlib.util.spec_from_file_location(_HELPERS, str(file.locate()))
            assert spec is not None and spec.loader is not None
            sys.modules[_HELPERS] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[_HELPERS])
            return True
    return False


def _skip_fused_kernels() -> None:
    """Megatron-LM builds CUDA extensions at start; not part of every Megatron-Core installation."""
    if importlib.util.find_spec("megatron.legacy") is None:
        return
    from megatron.legacy import fused_kernels

    kernels: Any = fused_kernels
    kernels.load = _returns(None)


def _print_no_stacks() -> None:
    """Undo what Megatron's inference coordinator registers when it is imported: a stack on SIGTERM.

    Helper processes get SIGTERM when a script ends, so the end of a good run looks like a crash.
    """
    with contextlib.suppress(ImportError):
        from megatron.core.inference import data_parallel_inference_coordinator  # noqa: F401
    for number in (signal.SIGTERM, signal.SIGINT):
        faulthandler.unregister(number)


def install() -> None:
    """Install the stand-ins. Called once, by :func:`nemo_megacpp.runtime.host.ensure_host`."""
    # Megatron's argument check requires it below compute capability 10, and refuses it with FSDP.
    if _FSDP not in sys.argv:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    distributed: Any = torch.distributed
    distributed.init_process_group = _on_gloo(distributed.init_process_group)
    _use_compiled_helpers()
    _describe_a_device()
    _skip_fused_kernels()
    _print_no_stacks()
