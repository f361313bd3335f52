"""Causal attention under context parallelism with keys and values in a ring (``p2p``).

Queries stay. The block of keys and values of each rank travels to the next rank, ``cp - 1`` times,
and every rank attends to the block that it holds while the next one is on its way. A rank
holds its own block, the current and the next one, and saves nothing but its own for the backward
pass.

In the backward pass the blocks travel the same way again, and the gradient of a block follows it: a
rank adds its part and passes it on, and after ``cp`` messages it is back at the rank that owns it.

Of a document's ``2·cp`` chunks rank ``r`` has chunks ``r`` and ``2·cp - 1 - r``
(:mod:`nemo_megacpp.mixers.sequence_layout`). So it sees its own block causally; of the block of a
lower rank the first half, with all queries; and all of the block of a higher rank, with the second
half of its queries. No mask is needed, and every rank does the same work in every step.

Both passes post the same messages on every rank in the same order, each a send and a receive at
once, so no rank waits for one that waits for it. A sum is always taken in the same order.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.distributed import P2POp, Work, batch_isend_irecv, irecv, isend
from torch.distributed import ProcessGroup as Group

from nemo_megacpp.mixers.kernels.block_attention import (
    Dropout,
    Piece,
    attend,
    attend_backward,
)
from nemo_megacpp.mixers.kernels.packing import accumulation_dtype
from nemo_megacpp.mixers.sequence_layout import TokenOrder


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    order: TokenOrder,
    cp_group: Group,
    scale: float,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Return the attention of this rank's queries to all keys and values before them.

    Args:
        query: ``[s/cp, b, n, d]``.
        key: ``[s/cp, b, g, d]``, where ``g`` divides ``n``.
        value: likewise.
        order: which tokens a rank holds, and their documents; a token sees its own document.
        cp_group: at least two ranks, in the order of their shares.
        scale: of the scores.
        dropout: of the weights; None: nothing is dropped.

    Returns:
        ``[s/cp, b, n·d]``.
    """
    output: torch.Tensor = _Ring.apply(query, key, value, order, cp_group, scale, dropout)
    return output


def pieces_of(order: TokenOrder, rank: int, source: int) -> list[Piece]:
    """Return what the queries of ``rank`` see of the block of ``source``, document by document."""
    found = []
    for bounds in pairwise(order.boundaries):
        start, end = (bound // order.cp for bound in bounds)
        middle = (start + end) // 2
        if start == end:
            continue
        if source == rank:
            found.append(Piece((start, end), (start, end), causal=True))
        elif source < rank:
            found.append(Piece((start, end), (start, middle)))
        else:
            found.append(Piece((middle, end), (start, end)))
    return found


class _Passing:
    """A message to the next rank and one from the rank before, both on their way.

    The tensor that is sent must not change before :meth:`wait`.
    """

    def __init__(self, sent: torch.Tensor, cp_group: Group):
        self._sent, self._received = sent, torch.empty_like(sent)
        rank, cp = cp_group.rank(), cp_group.size()
        self._works: list[Work] = batch_isend_irecv(
            [
                P2POp(isend, sent, group=cp_group, group_peer=(rank + 1) % cp),
                P2POp(irecv, self._received, group=cp_group, group_peer=(rank - 1) % cp),
            ]
        )

    def wait(self) -> torch.Tensor:
        """Return what has come."""
        for work in self._works:
            work.wait()
        return self._received


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        order: TokenOrder,
        cp_group: Group,
        scale: float,
        dropout: Dropout | None,
    ) -> torch.Tensor:
        rank, cp = cp_group.rank(), cp_group.size()
        own = torch.stack([_heads_first(key), _heads_first(value)])  # [2, b·g, s, d]
        rows = _rows(query, key.size(2)).mul_(scale)
        output = torch.zeros_like(rows)
        lse = rows.new_full((*rows.shape[:2], 1), float("-inf"))
        block = own
        for step in range(cp):
            source = (rank - step) % cp
            passing = _Passing(block, cp_group) if step < cp - 1 else None
            k, v = block.to(rows.dtype)
            pieces = pieces_of(order, rank, source)
            attend(rows, k, v, pieces, output, lse, _of_block(dropout, rank * cp + source))
            if passing is not None:
                block = passing.wait()
        context = _from_rows(output, query).flatten(2)
        ctx.save_for_backward(query, own, context, lse)
        ctx.order, ctx.cp_group, ctx.scale, ctx.dropout = order, cp_group, scale, dropout
        return context

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, block, context, lse = ctx.saved_tensors
        order, cp_group, dropout = ctx.order, ctx.cp_group, ctx.dropout
        rank, cp = cp_group.rank(), cp_group.size()
        groups = block.size(1) // query.size(1)
        rows = _rows(query, groups).mul_(ctx.scale)
        upstream = _rows(gradient.reshape(query.shape), groups)
        projected = (upstream * _rows(context.view(query.shape), groups)).sum(-1, keepdim=True)
        d_query = torch.zeros_like(rows)
        travelling: _Passing | None = None
        for step in range(cp):
            source = (rank - step) % cp
            passing = _Passing(block, cp_group) if step < cp - 1 else None
            k, v = block.to(rows.dtype)
            d_block = torch.zeros_like(block, dtype=rows.dtype)
            attend_backward(
                *(rows, k, v, pieces_of(order, rank, source), lse, upstream, projected),
                *(d_query, d_block[0], d_block[1], _of_block(dropout, rank * cp + source)),
            )
            if travelling is not None:
                d_block += travelling.wait()
            travelling = _Passing(d_block.to(block.dtype), cp_group)
            if passing is not None:
                block = passing.wait()
        assert travelling is not None
        d_key, d_value = (_tokens_first(t, query.size(1)) for t in travelling.wait())
        return _from_rows(d_query.mul_(ctx.scale), query), d_key, d_value, None, None, None, None


def _of_block(dropout: Dropout | None, block: int) -> Dropout | None:
    """Each block of scores has a seed of its own."""
    return dropout and Dropout(dropout.probability, dropout.seed + block)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """``[s, b, g, d]`` to ``[b·g, s, d]``."""
    return x.permute(1, 2, 0, 3).flatten(0, 1)


def _tokens_first(x: torch.Tensor, batch: int) -> torch.Tensor:
    """Undo :func:`_heads_first`."""
    return x.unflatten(0, (batch, -1)).permute(2, 0, 1, 3)


def _rows(x: torch.Tensor, groups: int) -> torch.Tensor:
    """``[s, b, g·r, d]`` to ``[b·g, s·r, d]``, a copy in the type that sums are taken in."""
    split = x.unflatten(2, (groups, -1)).permute(1, 2, 0, 3, 4)
    wide = split.to(accumulation_dtype(x), memory_format=torch.contiguous_format, copy=True)
    return wide.flatten(2, 3).flatten(0, 1)


def _from_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undo :func:`_rows`: ``[s, b, n, d]`` in the type of ``like``."""
    length, batch = like.shape[:2]
    split = rows.unflatten(0, (batch, -1)).unflatten(2, (length, -1))  # [b, g, s, r, d]
    moved = split.permute(2, 0, 1, 3, 4)
    return moved.to(like.dtype, memory_format=torch.contiguous_format).reshape(like.shape)
