"""Find the inputs that each element of an operator's outputs depends on, by running it again.

It knows no operator by name: one rank's share is replaced by NaN (integers and truth values by
others), and the elements that change depend on that share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_unflatten

_OVERWRITES = ("fill_", "zero_", "copy_")


@dataclass
class Probe:
    """One operator, and the shares of one gather that its inputs depend on.

    Attributes:
        func: the operator.
        leaves, form: its arguments, flattened.
        tensors: those that are tensors, as they were before it ran, by their place in ``leaves``.
        masks: the ranks that the elements of some of them depend on, as bits.
        changes: whether it writes to an argument.
    """

    func: Any
    leaves: list[Any]
    form: Any
    tensors: Mapping[int, torch.Tensor]
    masks: Mapping[int, torch.Tensor]
    changes: bool

    @property
    def is_elementwise(self) -> bool:
        """Whether torch declares the operator as element by element."""
        return torch.Tag.pointwise in self.func.tags

    def shares(self, outputs: list[Any]) -> list[torch.Tensor | None]:
        """Return the shares that each element of each output depends on."""
        overwrites = self.func._schema.name.split("::")[-1] in _OVERWRITES
        if self.is_elementwise and len(outputs) == 1 and not overwrites:
            shape = outputs[0].shape
            joined = reduce(torch.bitwise_or, (mask.expand(shape) for mask in self.masks.values()))
            return [joined]
        found = [
            torch.zeros(output.shape, dtype=torch.int32) if torch.is_tensor(output) else None
            for output in outputs
        ]
        union = reduce(int.__or__, (b for m in self.masks.values() for b in m.unique().tolist()))
        for bit in (1 << place for place in range(union.bit_length())):
            if not union & bit:
                continue
            changed = self._run(
                {i: _replaced(self.tensors[i], mask & bit != 0) for i, mask in self.masks.items()}
            )
            others = changed or [None] * len(outputs)
            for mask, output, other in zip(found, outputs, others, strict=True):
                if mask is None:
                    continue
                mask |= bit * _differs(output, other)
        # Where a float and an integer come together (the values and indices of a top-k), the
        # integer depends on what the float does: no integer is NaN.
        wide = {o.shape: m for m, o in zip(found, outputs, strict=True) if _is_float(o)}
        for mask, output in zip(found, outputs, strict=True):
            other = None if mask is None or _is_float(output) else wide.get(mask.shape)
            if mask is not None and other is not None:
                mask |= other
        return found

    def _run(self, replaced: Mapping[int, torch.Tensor]) -> list[Any] | None:
        """Return the outputs with other inputs; None if the operator does not take them."""
        leaves = list(self.leaves)
        for i, tensor in self.tensors.items():
            leaves[i] = replaced[i] if i in replaced else tensor.clone() if self.changes else tensor
        args, kwargs = tree_unflatten(leaves, self.form)
        try:
            with torch.random.fork_rng(devices=[]):
                return tree_leaves(self.func(*args, **kwargs))
        except (RuntimeError, IndexError):  # an index that was replaced is none
            return None

    def digest_of_others(self) -> str:
        """Return a digest of the tensors without shares of this gather; empty if there are none."""
        digest = hashlib.blake2b(digest_size=8)
        for i in self._others:
            digest.update(self.tensors[i].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest() if self._others else ""

    def meets_others(self, outputs: list[Any], found: list[torch.Tensor | None], mine: int) -> bool:
        """Return whether an element that depends on another rank's share depends on one of those
        tensors as well: where shares are copied beside other elements, none does."""
        if self.is_elementwise:
            return True
        everywhere = {i: torch.ones_like(self.tensors[i], dtype=torch.bool) for i in self._others}
        changed = self._run(
            {i: _replaced(self.tensors[i], where) for i, where in everywhere.items()}
        )
        return any(
            mask is not None and bool((_differs(output, other).bool() & (mask & ~mine != 0)).any())
            for mask, output, other in zip(
                found, outputs, changed or [None] * len(outputs), strict=True
            )
        )

    @property
    def _others(self) -> list[int]:
        return [i for i, t in self.tensors.items() if i not in self.masks and t.numel() > 1]


def _is_float(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


def _replaced(tensor: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return a copy with other elements at some places: NaN, or other legal indices."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.masked_fill(where, torch.nan)
    if tensor.dtype == torch.bool:
        return tensor ^ where
    largest = tensor.max() if tensor.numel() else 0
    return torch.where(where, largest - tensor, tensor)


def _differs(output: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """Return where an output changed; everywhere if it cannot be compared."""
    if other is None or other.shape != output.shape:
        return torch.ones(output.shape, dtype=torch.int32)
    differs = output != other
    if output.is_floating_point() or output.is_complex():
        differs &= ~(output.isnan() & other.isnan())
    return differs.int()
