"""What Megatron-Bridge needs beyond :mod:`cpu_scripts` to import and run without a GPU.

Bridge's package imports parts of libraries that are built for GPUs, and that a text model's
training never calls: Transformer Engine for adapters, the resiliency extension for restarts in the
process, Energon for images. Where such a library is absent, the one module of Bridge that names it
is given an empty module in its place while its body runs, and nobody else is: Megatron-Core, and
every other module of Bridge that asks whether the library is there, still finds it absent.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NEEDS = {
    "megatron.bridge.peft.lora_layers": ("transformer_engine", "transformer_engine.pytorch"),
    "megatron.bridge.data.energon.base_energon_datamodule": ("megatron.energon",),
    "megatron.bridge.training.pretrain": (
        "nvidia_resiliency_ext",
        "nvidia_resiliency_ext.inprocess",
    ),
}
"""Module of Bridge -> the modules of a library that its body imports, outermost first."""

supplied: set[str] = set()
"""Libraries in whose place empty modules are given, after :func:`install`."""


class _Empty(ModuleType):
    """A module in which every name is another empty module."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(f"{self.__name__}.{name}")

    def __or__(self, other: Any) -> Any:  # in annotations
        return self


class _Supplied(Loader):
    """Runs a module's body with empty modules in the place of absent ones.

    Args:
        loader: of the module.
        names: the absent modules.
    """

    def __init__(self, loader: Loader, names: tuple[str, ...]):
        self._loader, self._names = loader, names

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with _in_place(self._names):
            self._loader.exec_module(module)


@contextmanager
def _in_place(names: tuple[str, ...]) -> Iterator[None]:
    """Put empty modules in ``sys.modules``, and take them out again."""
    for name in names:
        sys.modules[name] = module = _Empty(name)
        parent = sys.modules.get(name.rpartition(".")[0])
        if isinstance(parent, _Empty):
            setattr(parent, name.rpartition(".")[2], module)
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


class _Finder(MetaPathFinder):
    """Finds the modules of Bridge that need an absent library."""

    def __init__(self, needs: dict[str, tuple[str, ...]]):
        self._needs = needs

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in self._needs:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Supplied(spec.loader, self._needs[name])
        return spec


def absent_libraries() -> list[str]:
    """Return the libraries that Bridge's package imports and that are not installed."""
    found = {names[0] for names in _NEEDS.values() if importlib.util.find_spec(names[0]) is None}
    return sorted(found)


def _barrier_without_devices(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Bridge's first barrier names a CUDA device, which gloo refuses."""

    def barrier(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return stock(*args, **kwargs)

    return barrier


def _no_accelerator_stream(*args: Any, **kwargs: Any) -> Any:
    """``torch.accelerator`` finds no device; the stand-in of ``torch.cuda`` has a stream."""
    import torch

    return torch.cuda.current_stream()


def install() -> None:
    """Install the stand-ins. Called once, by :func:`nemo_megacpp.runtime.host.ensure_host`, after
    Megatron-Core was imported without the libraries."""
    supplied.update(absent_libraries())
    needs = {module: names for module, names in _NEEDS.items() if names[0] in supplied}
    if needs:
        sys.meta_path.insert(0, _Finder(needs))
    import torch

    distributed: Any = torch.distributed
    distributed.barrier = _barrier_without_devices(distributed.barrier)
    accelerator: Any = torch.accelerator
    accelerator.current_stream = _no_accelerator_stream
