"""Which module of a model is running, in the forward pass and in the backward pass."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Phase = Literal["forward", "backward", "recompute"]
_HERE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Place:
    """One run of a module.

    Attributes:
        path: as parameters are named in a checkpoint, by the global index of the layer.
        class_name: of the module.
        layer: global number of the layer, from 1; None outside layers.
        family: letter of the layer, ``embedding`` or ``head``, or empty.
        run: how many times the module has run, this time included; recomputed runs count alone.
    """

    path: str
    class_name: str
    layer: int | None
    family: str
    run: int


class ModulePlaces:
    """Follows the modules of this rank's chunks while they run.

    A node of the autograd graph belongs to the innermost module whose forward pass made it, which
    is told by its number: torch numbers nodes in the order in which they are made.

    Args:
        chunks: model chunks, unwrapped.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]):
        self._open: list[tuple[Place, int]] = []
        self._made: list[tuple[int, int, Place]] = []
        self._runs: Counter[tuple[str, bool]] = Counter()
        self._handles: list[Any] = []
        for chunk in chunks:
            self._watch(chunk)

    def close(self) -> None:
        """Stop to follow the modules."""
        for handle in self._handles:
            handle.remove()

    @property
    def phase(self) -> Phase:
        """What is running: a forward pass inside the backward pass is a recomputed one."""
        if torch._C._current_graph_task_id() == -1:
            return "forward"
        return "recompute" if self._open else "backward"

    def here(self) -> Place | None:
        """Return the innermost module that is running, or whose gradient is computed."""
        if self._open:
            return self._open[-1][0]
        node = torch._C._current_autograd_node()
        return None if node is None else self._place_of(node._sequence_nr())

    def function(self) -> str:
        """Return the innermost function of Python outside torch and this room; in the backward pass
        the node of autograd."""
        if self.phase == "backward":
            node = torch._C._current_autograd_node()
            return "" if node is None else node.name()
        frame: Any = sys._getframe(1)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if not module.startswith(("torch.", _HERE)):
                return frame.f_code.co_qualname
            frame = frame.f_back
        return ""

    def _place_of(self, number: int) -> Place | None:
        inside = [made for made in self._made if made[0] <= number < made[1]]
        return min(inside, key=lambda made: made[1] - made[0])[2] if inside else None

    def _watch(self, chunk: Any) -> None:
        names = {module: name for name, module in chunk.named_modules()}
        stack = chunk.decoder
        inside: dict[str, tuple[int | None, str, str]] = {}
        for local, (index, family) in enumerate(
            zip(stack.layer_range, stack.families, strict=True)
        ):
            path = f"decoder.layers.{index}"
            inside[f"decoder.layers.{local}"] = (index + 1, family.value, path)
        for name, family in (
            ("embedding", "embedding"),
            ("decoder.final_norm", "head"),
            ("output_layer", "head"),
        ):
            inside[name] = (None, family, name)
        for module, name in names.items():
            root = next((r for r in inside if name == r or name.startswith(f"{r}.")), None)
            layer, family, path = (None, "", name) if root is None else inside[root]
            full = name if root is None else path + name.removeprefix(root)
            self._hook(module, full, layer, family)

    def _hook(self, module: torch.nn.Module, path: str, layer: int | None, family: str) -> None:
        name = type(module).__name__

        def before(*_: Any) -> None:
            again = torch._C._current_graph_task_id() != -1
            self._runs[path, again] += 1
            place = Place(path, name, layer, family, self._runs[path, again])
            self._open.append((place, torch.autograd._get_sequence_nr()))

        def after(*_: Any) -> None:
            place, start = self._open.pop()
            self._made.append((start, torch.autograd._get_sequence_nr(), place))

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after))
