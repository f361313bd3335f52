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
    """The device that this process uses.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        backend: the ``torch.distributed`` backend that goes with it (``"nccl"`` or ``"gloo"``).
    """

    device: Literal["cuda", "cpu"]
    backend: Literal["nccl", "gloo"]


def current_host() -> Host:
    """Return the host without changing anything."""
    if "torch" in _installed:  # torch.cuda.is_available() may be a stand-in for a script
        return Host("cpu", "gloo")
    import torch

    if torch.cuda.is_available():
        return Host("cuda", "nccl")
    return Host("cpu", "gloo")


def ensure_host(*, nemo: bool = False, script: bool = False, bridge: bool = False) -> Host:
    """Make this process able to build and train Megatron modules; safe to call again.

    With a GPU nothing is changed. Without one, stand-ins for the parts of ``torch.cuda`` that
    Megatron-Core touches are installed, and torch forms of the kernels that its ``MambaMixer``
    calls.

    Args:
        nemo: also make NeMo's Megatron strategy run (imports NeMo).
        script: also make Megatron-LM's own training scripts run, which check for a CUDA device.
        bridge: also make Megatron-Bridge import and train.

    Returns:
        The host that the process now runs on.
    """
    host = current_host()
    if host.device == "cuda":
        return host
    for name, wanted in (
        ("torch", True),
        ("megatron", True),
        ("nemo", nemo),
        ("script", script or bridge),  # Bridge checks for a CUDA device as the scripts do
        ("bridge", bridge),
    ):
        if wanted and name not in _installed:
            _install(name)
            _installed.add(name)
    return host


def supplied_libraries() -> list[str]:
    """Return the absent libraries for which empty modules let Megatron-Bridge be imported."""
    if "bridge" not in _installed:
        return []
    from nemo_megacpp.runtime.cpu_bridge import supplied

    return sorted(supplied)


def _install(name: str) -> None:
    """Import and install the stand-ins of ``name``; each module needs those installed before it."""
    if name == "torch":
        from nemo_megacpp.runtime.cpu_torch import install
    elif name == "megatron":
        from nemo_megacpp.runtime.cpu_megatron import install
    elif name == "nemo":
        from nemo_megacpp.runtime.cpu_nemo import install
    elif name == "bridge":
        from nemo_megacpp.runtime.cpu_bridge import install
    else:
        from nemo_megacpp.runtime.cpu_scripts import install
    install()
