"""Decays over every stretch of tokens inside chunks, as segment sums: nothing is subtracted.

The logarithm of a decay over tokens ``j+1 … i`` is the sum of theirs. As a difference of two sums
from the chunk's start it would lose the digits that one large term takes, and so would its
gradient. Here a stretch is halved at the largest power of two between its ends: what lies left of
it is a sum up to it, what lies right a sum from it, so the decay is the product of two factors, one
of ``i`` and one of ``j``. Between tokens of the same eight, the sum is written out.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_NEAR = 8  # tokens in the smallest stretch; smaller halves cost more operations than they save


def cut(x: Tensor, step: int) -> tuple[Tensor, ...]:
    """Cut ``[b, c, ...]`` into blocks of ``step`` chunks; a short row is one block as it is."""
    return (x,) if x.shape[1] <= step else x.split(step, dim=1)


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
        near: ``[b, c, h, q/s, s, s]``, the decays between tokens of the same ``s``; overwritten.
        halves: ``[b, c, h, ·, q]``: for halves of s, 2s, 4s, … tokens, the factors of the tokens of
            second halves (from the middle up to the token), then those of first halves (from
            behind the token to the middle).
        step: the number of chunks in a block.
    """

    def __init__(self, near: Tensor, halves: Tensor, step: int):
        batch, count, heads, _, size = halves.shape
        self._near = cut(near.tril_(), step)
        self._size = size
        self._factors = []
        outer, start = halves.stride()[:3], halves.storage_offset()
        for half in _halves(size):
            shape = (batch, count, heads, size // (2 * half), half)
            second = halves.as_strided((*shape, 1), (*outer, half, 1, 1), start)
            middle = start + size // 2
            first = halves.as_strided((*shape[:4], 1, half), (*outer, half, 1, 1), middle)
            start += size
            self._factors.append((cut(second, step), cut(first, step)))
        self._squares: dict[int, tuple[Tensor, Tensor, Tensor, list[Tensor]]] = {}

    def of(self, block: int, diagonal: Tensor | None = None) -> Tensor:
        """Return the decays of a block of ``k`` chunks, zero for ``j > i``.

        Args:
            block: its number.
            diagonal: ``[b, k, h, q]``, put in place of the ones for ``j = i``.

        Returns:
            ``[b, k, h, q, q]`` with axes ``i``, ``j``; the next call overwrites it.
        """
        near = self._near[block]
        square, own, diagonal_squares, quadrants = self._square(near)
        diagonal_squares.copy_(near)
        if diagonal is not None:
            own.copy_(diagonal)
        for (second, first), to in zip(self._factors, quadrants, strict=True):
            torch.mul(second[block], first[block], out=to)
        return square

    def _square(self, near: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        count, size = near.shape[1], self._size
        if count not in self._squares:
            square = near.new_zeros(*near.shape[:3], size, size)
            outer = square.stride()[:3]

            def along(half: int, step: int, offset: int) -> Tensor:
                shape = (*near.shape[:3], size // step, half, half)
                return square.as_strided(shape, (*outer, step * (size + 1), size, 1), offset)

            side = near.shape[-1]
            self._squares[count] = (
                square,
                square.diagonal(dim1=-2, dim2=-1),
                along(side, side, 0),
                # Second half by first half of each stretch of 2·half tokens.
                [along(half, 2 * half, half * size) for half in _halves(size)],
            )
        return self._squares[count]


@cache
def _halves(size: int) -> tuple[int, ...]:
    halves = (1 << level for level in range(size.bit_length() - 1))
    return tuple(half for half in halves if half >= _NEAR)


@cache
def _segments(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which tokens each decay sums over, ``[q, ·]`` of zeros and ones: level after level as in
    :class:`InnerDecays`, then from the chunk's start, then to its end."""
    token = torch.arange(size)
    row = token[:, None]  # the token that is summed
    segments = []
    for half in _halves(size):
        # Of every token, whether it lies in a second half; second halves first, then first halves.
        later = (token // half) % 2 == 1
        up_to = (row // half == token // half) & (row <= token)
        behind = (row // half == token // half) & (row > token)
        segments += [up_to[:, later], behind[:, ~later]]
    segments += [row <= token, row > token]
    return torch.cat(segments, dim=1).to(device=device, dtype=dtype)


@cache
def _near_segments(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which of ``s`` tokens lie behind ``j`` and up to ``i``: ``[s, s·s]``, columns ``i, j``."""
    token = torch.arange(size)
    summed, i, j = token[:, None, None], token[:, None], token
    return ((j < summed) & (summed <= i)).flatten(1).to(device=device, dtype=dtype)


def segment_decays(log_decay: Tensor, step: int) -> SegmentDecays:
    """Build the decays of every chunk from ``log_decay [b, c, h, q]``, for blocks of ``step``."""
    size = log_decay.shape[-1]
    side = min(size, _NEAR)
    kind = log_decay.dtype, log_decay.device
    # A product with zeros and ones adds what lies in a stretch and nothing else, in one operation.
    near = (log_decay.view(-1, side) @ _near_segments(side, *kind)).exp_()
    near = near.view(*log_decay.shape[:3], -1, side, side)
    decays = (log_decay @ _segments(size, *kind)).exp_().unflatten(-1, (-1, size))
    inner = InnerDecays(near, decays[..., :-2, :], step)
    return SegmentDecays(inner, decays[..., -2, :], decays[..., -1, :])


@cache
def _pairs(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    up_to = torch.ones(size, size, dtype=dtype, device=device).tril_()
    return up_to, up_to.t() - torch.eye(size, dtype=dtype, device=device)


def log_decay_gradient(
    inner: Tensor, of_states: tuple[Tensor, Tensor, Tensor] | None = None
) -> Tensor:
    """Return the gradient ``[b, k, h, q]`` of ``log_decay``, from those of the decays' logarithms.

    Token ``t`` decays every pair ``(i, j)`` with ``j < t <= i``. A chain of differences would take
    the small gradient of a token from large sums: three digits of float32 under strong decay.

    Args:
        inner: ``[b, k, h, q, q]``; overwritten.
        of_states: of the incoming and outgoing decays, ``[b, k, h, q]`` each, and of the total,
            ``[b, k, h]``; None if no state crosses a chunk's ends.
    """
    up_to, earlier = _pairs(inner.shape[-1], inner.dtype, inner.device)
    grad = (inner @ earlier).mul_(up_to).sum(dim=-2)
    if of_states is None:
        return grad
    incoming, outgoing, total = of_states
    grad += incoming @ up_to
    grad += outgoing @ earlier
    return grad.add_(total[..., None])
