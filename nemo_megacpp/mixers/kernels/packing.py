"""What every op here shares: the accumulation dtype and the documents of packed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_megacpp.errors import UserError


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for a float64 tensor and float32 for every other floating dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raise :class:`UserError` unless ``tensor.shape == expected``; ``meaning`` names the axes."""
    if tuple(tensor.shape) != expected:
        raise UserError(
            f"{name} must have shape {meaning} = {list(expected)}, got {list(tensor.shape)}."
        )


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
    check_shape("seq_idx", seq_idx, (batch, length), "[b, l]")
    if seq_idx.is_floating_point() or seq_idx.is_complex():
        raise UserError(f"seq_idx must hold integers, got dtype {seq_idx.dtype}.")
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


def document_ids(seq_idx: Tensor, batch: int, length: int) -> Tensor:
    """Number the documents of each row 0, 1, 2, ... in token order; int64 ``[b, l]``."""
    return document_starts(seq_idx, batch, length).long().cumsum(dim=1)


def chunked_ids(ids: Tensor, chunk_size: int) -> Tensor:
    """Cut document numbers ``[b, l]`` into ``[b, c, chunk_size]``.

    Padding continues the last document: it must not erase the final state.
    """
    missing = -ids.shape[1] % chunk_size
    padded = torch.cat([ids, ids[:, -1:].expand(-1, missing)], dim=1)
    return padded.unflatten(1, (-1, chunk_size))
