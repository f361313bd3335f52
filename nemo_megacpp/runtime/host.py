"""The host that a process runs on: CUDA as it is, or the no-GPU host.

Megatron-Core 0.16.1 and NeMo 2.7.3 name CUDA in their module bodies, constructors and collectives.
:func:`ensure_host` makes both run, unmodified, with real modules on gloo when there is no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_installed: set[str] = set()


@dataclass(frozen=True)
class Host:
    """What the process computes on.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        backend: the ``torch.distributed`` backend that goes with it (``"nccl"`` or ``"gloo"``).
    """

    device: Literal["cuda", "cpu"]
    backend: Literal["nccl", "gloo"]


def current_host() -> Host:
    """Return the host without changing anything."""
    if "torch" in _installed:  # whatever a foreign script is told about CUDA
        return Host("cpu", "gloo")
    import torch

    if torch.cuda.is_available():
        return Host("cuda", "nccl")
    return Host("cpu", "gloo")


def ensure_host(*, nemo: bool = False, script: bool = False) -> Host:
    """Make this process able to build and train Megatron modules; safe to call again.

    With a GPU nothing is changed. Without one, stand-ins for the parts of ``torch.cuda`` that
    Megatron-Core touches are installed, and torch forms of the kernels that its ``MambaMixer``
    calls.

    Args:
        nemo: also make NeMo's Megatron strategy run (imports NeMo).
        script: also make Megatron-LM's own training scripts run, which ask for a CUDA device.

    Returns:
        The host that the process now runs on.
    """
    host = current_host()
    if host.device == "cuda":
        return host
    if "torch" not in _installed:
        from nemo_megacpp.runtime import cpu_torch

        cpu_torch.install()
        _installed.add("torch")
    if "megatron" not in _installed:
        from nemo_megacpp.runtime import cpu_megatron

        cpu_megatron.install()
        _installed.add("megatron")
    if nemo and "nemo" not in _installed:
        from nemo_megacpp.runtime import cpu_nemo

        cpu_nemo.install()
        _installed.add("nemo")
    if script and "script" not in _installed:
        from nemo_megacpp.runtime import cpu_scripts

        cpu_scripts.install()
        _installed.add("script")
    return host
