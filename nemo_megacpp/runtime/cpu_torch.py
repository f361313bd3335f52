"""Stand-ins for the parts of torch that name CUDA, for a process without a GPU.

``torch.cuda.is_available()`` still returns False. Only calls that would raise run on the CPU: the
current device, its random state, streams and events, ``.cuda()``, and tensors created with
``device="cuda"`` or in pinned memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._device

_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)
_TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


class NoStream:
    """A CUDA stream or event on a device that runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _return_self(self, *args: Any) -> NoStream:
        return self

    record = wait = synchronize = wait_stream = wait_event = record_event = _return_self
    __enter__ = _return_self

    def __exit__(self, *exc: Any) -> None: ...

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def elapsed_time(self, other: Any) -> float:
        return 0.0


_STREAM = NoStream()


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with ``device="cuda"`` replaced by the CPU and without pinned memory."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return call


def _to_on_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return to(self, *args, **kwargs)

    return call


@contextlib.contextmanager
def _no_stream_context(stream: Any) -> Iterator[None]:
    yield


def _return_self(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


def _nothing() -> Callable[..., None]:
    """Return a function that does nothing: a new one for each name, because torch's compiler
    identifies functions by object and refuses one that has two names."""

    def stand_in(*args: Any, **kwargs: Any) -> None:
        return None

    return stand_in


def install() -> None:
    """Install the stand-ins. Called once, by :func:`nemo_megacpp.runtime.host.ensure_host`."""
    # Megatron compiles small functions with torch.compile, which needs a C++ compiler; eagerly they
    # compute the same.
    torch.compiler.set_stance("force_eager")
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.set_device = _nothing()
    cuda.synchronize = _nothing()
    # One generator is both the CPU's and CUDA's. Megatron's tracker saves and restores its state
    # around every fork, so the streams of random numbers are separate.
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.random.set_rng_state = cuda.set_rng_state
    cuda.manual_seed = torch.manual_seed
    cuda.Stream = NoStream
    cuda.Event = NoStream
    cuda.stream = _no_stream_context
    cuda.current_stream = lambda device=None: _STREAM
    cuda.default_stream = lambda device=None: _STREAM

    tensor: Any = torch.Tensor
    tensor.cuda = _return_self
    tensor.pin_memory = _return_self
    tensor.record_stream = _nothing()
    module: Any = torch.nn.Module
    module.cuda = _return_self

    # ``with torch.device(…)`` finds the factories by identity, in a list made at its first use.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _TENSOR_FACTORIES:
        setattr(tensor, name, _on_cpu(getattr(tensor, name)))
    tensor.to = _to_on_cpu(tensor.to)
