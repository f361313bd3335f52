"""Decays over every stretch of tokens inside chunks, as segment sums: nothing is subtracted.

The logarithm of a decay over tokens ``j+1 … i`` is the sum of theirs. As a difference of two sums
from the chunk's start it would lose the digits that one large term takes, and so would its
gradient. Here a stretch is halved at the largest power of two between its ends: what lies left of
it is a sum up to it, what lies right a sum from it, so the decay is the product of two factors, one
of ``i`` and one of ``j``.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class SegmentDecays(NamedTuple):
    """Decays inside chunks of ``q`` tokens, ``q`` a power of two.

    Attributes:
        inner: the decays between tokens of a chunk.
        incoming: ``[b, c, h, q]``, the decay from before the chunk to each token.
        outgoing: ``[b, c, h, q]``, the decay from each token to the end of the chunk.
    """

    inner: InnerDecays
    incoming: Tensor
    outgoing: Tensor

    def total(self) -> Tensor:
        """``[b, c, h]``, the decay over each chunk."""
        return self.incoming[..., -1]


class InnerDecays:
    """The decay from token ``j`` to token ``i`` of a chunk, built a few chunks at a time.

    Args:
        halves: ``[b, c, h, log2 q, q]``: for halves of 1, 2, 4, … tokens, the factors of the tokens
            of second halves (from the middle up to the token), then those of first halves (from
            behind the token to the middle).
        step: the number of chunks in a block.
    """

    def __init__(self, halves: Tensor, step: int):
        batch, count, heads, levels, size = halves.shape
        self._shape = (batch, heads, levels, size)
        self._counts = [min(step, count - start) for start in range(0, count, step)]
        self._like = halves
        self._factors = []
        outer, start = halves.stride()[:3], halves.storage_offset()
        for half in (1 << level for level in range(levels)):
            shape = (batch, count, heads, size // (2 * half), half)
            second = halves.as_strided((*shape, 1), (*outer, half, 1, 1), start)
            middle = start + size // 2
            first = halves.as_strided((*shape[:4], 1, half), (*outer, half, 1, 1), middle)
            start += size
            self._factors.append((second.split(step, dim=1), first.split(step, dim=1)))
        self._squares: dict[int, tuple[Tensor, Tensor, list[Tensor]]] = {}

    def of(self, block: int, diagonal: Tensor | None = None) -> Tensor:
        """Return the decays of a block of ``k`` chunks, zero for ``j > i``.

        Args:
            block: its number.
            diagonal: ``[b, k, h, q]``, put in place of the ones for ``j = i``.

        Returns:
            ``[b, k, h, q, q]`` with axes ``i``, ``j``; the next call overwrites it.
        """
        count = self._counts[block]
        square, own, quadrants = self._squares.get(count) or self._new_square(count)
        if diagonal is not None:
            own.copy_(diagonal)
        for (second, first), to in zip(self._factors, quadrants, strict=True):
            torch.mul(second[block], first[block], out=to)
        return square

    def _new_square(self, count: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        batch, heads, levels, size = self._shape
        square = self._like.new_zeros(batch, count, heads, size, size)
        own = square.diagonal(dim1=-2, dim2=-1).fill_(1)
        quadrants = []
        for half in (1 << level for level in range(levels)):
            # Second half by first half of each stretch of 2·half tokens.
            shape = (batch, count, heads, size // (2 * half), half, half)
            strides = (*square.stride()[:3], 2 * half * (size + 1), size, 1)
            quadrants.append(square.as_strided(shape, strides, half * size))
        self._squares[count] = (square, own, quadrants)
        return self._squares[count]


@cache
def _segments(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which tokens each decay sums over, ``[q, (log2 q + 2)·q]`` of zeros and ones: level after
    level as in :class:`InnerDecays`, then from the chunk's start, then to its end."""
    token = torch.arange(size)
    row = token[:, None]  # the token that is summed
    segments = []
    for half in (1 << level for level in range(size.bit_length() - 1)):
        # Of every token, whether it lies in a second half; second halves first, then first halves.
        later = (token // half) % 2 == 1
        up_to = (row // half == token // half) & (row <= token)
        behind = (row // half == token // half) & (row > token)
        segments += [up_to[:, later], behind[:, ~later]]
    segments += [row <= token, row > token]
    return torch.cat(segments, dim=1).to(device=device, dtype=dtype)


def segment_decays(log_decay: Tensor, step: int) -> SegmentDecays:
    """Build the decays of every chunk from ``log_decay [b, c, h, q]``, for blocks of ``step``."""
    size = log_decay.shape[-1]
    # A product with zeros and ones adds what lies in a stretch and nothing else, in one operation.
    decays = log_decay @ _segments(size, log_decay.dtype, log_decay.device)
    decays = decays.exp_().unflatten(-1, (-1, size))
    return SegmentDecays(
        InnerDecays(decays[..., :-2, :], step), decays[..., -2, :], decays[..., -1, :]
    )


@cache
def _pairs(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    up_to = torch.ones(size, size, dtype=dtype, device=device).tril_()
    return up_to, up_to.t() - torch.eye(size, dtype=dtype, device=device)


def log_decay_gradient(inner: Tensor, incoming: Tensor, outgoing: Tensor, total: Tensor) -> Tensor:
    """Return the gradient ``[b, k, h, q]`` of ``log_decay``, from those of the decays' logarithms.

    Token ``t`` decays every pair ``(i, j)`` with ``j < t <= i``. A chain of differences would take
    the small gradient of a token from large sums: three digits of float32 under strong decay.

    Args:
        inner: ``[b, k, h, q, q]``; overwritten.
        incoming: ``[b, k, h, q]``; so is outgoing.
        total: ``[b, k, h]``.
    """
    up_to, earlier = _pairs(inner.shape[-1], inner.dtype, inner.device)
    grad = (inner @ earlier).mul_(up_to).sum(dim=-2)
    grad += incoming @ up_to
    grad += outgoing @ earlier
    return grad.add_(total[..., None])
