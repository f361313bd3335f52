"""What every op here shares: the accumulation dtype and the documents of packed rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_megacpp.errors import UserError


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for a float64 tensor and float32 for every other floating dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_shapes(tensors: Mapping[str, tuple[Tensor | None, str]], **known: int) -> dict[str, int]:
    """Return the size of every axis, after checking that tensors agree on them.

    Args:
        tensors: name -> tensor (None: not given) and its axes, one letter each: ``"b l h p"``.
        known: sizes of axes that are known before.

    Raises:
        UserError: a tensor has another number of axes, or a size that differs from that of the
            tensors before it; or ``l`` is zero.
    """
    sizes = dict(known)
    for name, (tensor, axes) in tensors.items():
        letters = axes.split()
        if tensor is None:
            continue
        if tensor.dim() != len(letters) or any(
            sizes.setdefault(axis, size) != size
            for axis, size in zip(letters, tensor.shape, strict=True)
        ):
            found = ", ".join(f"{axis}={sizes[axis]}" for axis in letters if axis in sizes)
            raise UserError(
                f"{name} must have shape [{', '.join(letters)}] ({found}), got "
                f"{list(tensor.shape)}."
            )
    if sizes.get("l") == 0:
        raise UserError("the sequence must hold at least one token, got l=0.")
    return sizes


def check_groups(heads: int, groups: int) -> None:
    """Raise :class:`UserError` unless the heads fall in equal groups."""
    if groups == 0 or heads % groups:
        raise UserError(f"the number of heads ({heads}) must be a multiple of groups ({groups}).")


def document_starts(seq_idx: Tensor, batch: int, length: int) -> Tensor:
    """Mark the first token of every document but the first.

    Args:
        seq_idx: integer ``[b, l]``. A new document begins wherever the value changes from one token
            to the next, so values need not be sorted and may be used again.
        batch, length: the ``b`` and ``l`` that the caller's activations have.

    Returns:
        bool ``[b, l]``. Token 0 is never marked: it continues the initial state.

    Raises:
        UserError: the shape or the dtype is wrong.
    """
    check_shapes({"seq_idx": (seq_idx, "b l")}, b=batch, l=length)
    if seq_idx.is_floating_point() or seq_idx.is_complex():
        raise UserError(f"seq_idx must hold integers, got dtype {seq_idx.dtype}.")
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


def document_ids(seq_idx: Tensor, batch: int, length: int) -> Tensor:
    """Number the documents of each row 0, 1, 2, ... in token order; int64 ``[b, l]``."""
    return document_starts(seq_idx, batch, length).long().cumsum(dim=1)
