"""The most memory that a rank's tensors hold at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_megacpp.runtime.host import current_host


class PeakMemory:
    """Measures between :meth:`start` and :meth:`stop`.

    On a GPU by the counter of torch's allocator. On a CPU it counts the storages of tensors, each
    from the operator that returns it until it is freed: the resident memory of a process is mostly
    that of its libraries, and does not fall when a tensor is freed.
    """

    def start(self) -> None:
        """Begin to measure."""
        if current_host().device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return
        gc.collect()
        kinds = (torch.Tensor, torch.nn.Parameter)  # not proxies, which compute their class
        self._storages = _Storages(value for value in gc.get_objects() if type(value) in kinds)
        self._storages.__enter__()

    def stop(self) -> int:
        """Return the peak since the start, in bytes."""
        if current_host().device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        self._storages.__exit__(None, None, None)
        return self._storages.peak


class _Storages(TorchDispatchMode):
    """Counts the storages that are alive.

    Args:
        tensors: those that are alive at the start.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref] = {}
        self._held = self.peak = 0
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return found

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def freed(_: Any) -> None:
            del self._alive[key]
            self._held -= size

        self._alive[key] = weakref.ref(storage, freed)
        self._held += size
        self.peak = max(self.peak, self._held)
