"""Rows of tokens cut into chunks for the chunked scans; no chunk holds tokens of two documents.

A chunk that begins a document starts from a zero state, so nothing of one document, a NaN least of
all, is ever multiplied with another's: there are no masks between documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nemo_megacpp.mixers.kernels.packing import document_ids

_SMALLEST = 8
LARGEST = 64  # on a CPU larger chunks take longer


class Chunks(NamedTuple):
    """How ``[b, l]`` tokens lie in ``[b, c, q]`` slots; slots without a token are zero.

    Attributes:
        length: ``l``.
        size: ``q``, a power of two.
        token: ``[b·c·q]``, the token (of ``b·l``) in each slot, or -1; None where chunk follows
            chunk without a gap, as in rows of one document.
        slot: ``[b·l]``, the slot of each token.
        starts: bool ``[b, c]``, chunks that begin a document other than the row's first.
    """

    length: int
    size: int
    token: Tensor | None = None
    slot: Tensor | None = None
    starts: Tensor | None = None


def cut_into_chunks(
    batch: int, length: int, chunk_size: int, seq_idx: Tensor | None = None
) -> Chunks:
    """Choose the chunks of ``[b, l]`` tokens.

    Args:
        batch, length: ``b`` and ``l``.
        chunk_size: tokens in a chunk, rounded down to a power of two and at most ``LARGEST``;
            smaller where the row, or most of its documents, are shorter.
        seq_idx: integer ``[b, l]``; a document begins wherever the value changes.
    """
    size = 1 << (min(chunk_size, LARGEST, 2 * length - 1).bit_length() - 1)
    if seq_idx is None:
        return Chunks(length, size)
    ids = document_ids(seq_idx, batch, length)
    token = torch.arange(length, device=ids.device).expand_as(ids)
    is_start = torch.ones_like(ids, dtype=torch.bool)
    is_start[:, 1:] = ids[:, 1:] != ids[:, :-1]
    position = token - torch.where(is_start, token, 0).cummax(dim=1).values

    def counted(size: int) -> int:
        return int((position % size == 0).sum(dim=1).max())

    # Halve chunks that are mostly empty slots.
    while size > _SMALLEST and counted(size // 2) * 4 <= counted(size) * 5:
        size //= 2
    number = (position % size == 0).cumsum(dim=1) - 1
    count = int(number.max()) + 1
    row = torch.arange(batch, device=ids.device)[:, None]
    slot = ((row * count + number) * size + position % size).flatten()
    tokens = torch.full((batch * count * size,), -1, device=ids.device)
    tokens[slot] = torch.arange(batch * length, device=ids.device)
    starts = torch.zeros(batch, count, dtype=torch.bool, device=ids.device)
    starts[row.expand_as(ids)[is_start], number[is_start]] = True
    starts[:, 0] = False  # the row's first document continues the initial state
    return Chunks(length, size, tokens, slot, starts)


def to_chunks(x: Tensor, chunks: Chunks) -> Tensor:
    """Cut ``[b, l, ...]`` into ``[b, c, q, ...]``."""
    if chunks.token is not None:
        assert chunks.slot is not None
        rows: Tensor = _TakeRows.apply(x.flatten(0, 1), chunks.token, chunks.slot)
        return rows.unflatten(0, (x.shape[0], -1, chunks.size))
    missing = -chunks.length % chunks.size
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (-1, chunks.size))


def from_chunks(x: Tensor, chunks: Chunks) -> Tensor:
    """Join ``[b, c, q, ...]`` to ``[b, l, ...]``; undo :func:`to_chunks`."""
    if chunks.slot is not None:
        assert chunks.token is not None
        rows: Tensor = _TakeRows.apply(x.flatten(0, 2), chunks.slot, chunks.token)
        return rows.unflatten(0, (x.shape[0], -1))
    return x.flatten(1, 2)[:, : chunks.length]


def last_token(x: Tensor, chunks: Chunks) -> Tensor:
    """The row's last token of ``[b, c, q, ...]``: ``[b, ...]``."""
    if chunks.slot is None:
        return x.flatten(1, 2)[:, chunks.length - 1]
    return x.flatten(0, 2)[chunks.slot.view(-1, chunks.length)[:, -1]]


class _TakeRows(torch.autograd.Function):
    """``x[index]``, zero where the index is -1; no row is taken twice.

    ``inverse`` is the index that leads back, so the backward takes rows as well and adds nothing.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _take(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _take(grad, inverse), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    empty = index < 0
    return x.index_select(0, index.clamp(min=0)).index_fill_(0, empty.nonzero()[:, 0], 0)
