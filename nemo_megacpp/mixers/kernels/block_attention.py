"""Attention to one block of keys and values at a time: an online softmax and its backward pass.

Each query row carries the log-sum-exp ``l`` of all scores that it has seen, and the output ``o``
that is normalized by it. A further block with scores ``S`` and values ``V`` gives::

    l' = log(exp(l) + Σ exp(S));  o' = exp(l - l') o + exp(S - l') V

With the final ``l`` and ``o``, a block's part of the gradients follows from that block alone: with
``P = exp(S - l)`` and ``g``, the gradient of ``o``::

    dV = Pᵀ g;  dS = P ⊙ (g Vᵀ - rowsum(g ⊙ o));  dQ = dS K;  dK = dSᵀ Q

Source: Milakov and Gimelshein (arXiv 1805.02867), FlashAttention-2 (arXiv 2307.08691).

With ``g`` key heads and ``r`` query heads to each, keys are ``[b·g, s, d]`` and queries
``[b·g, s·r, d]``: the ``r`` queries of a token lie next to each other. All tensors are float32 or
float64. Dropout acts on ``P``, as after a softmax; ``l`` is that of all scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 128
"""Query rows of a tile. It must not depend on the number of heads, which TP changes."""
ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""By device, the scores that are computed at once: those of as many heads as fit (on a CPU, into
the cache of a core), and at least of one."""


class Piece(NamedTuple):
    """A part of a block's scores of which nothing is masked, or all above the diagonal.

    Attributes:
        queries: the first token and the one after the last, in the share of their rank.
        keys: likewise.
        causal: whether a query sees only the keys up to its own place; both are as many then.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool = False


class Dropout(NamedTuple):
    """Which weights of a block are dropped: always the same ones for one seed."""

    probability: float
    seed: int


class _Tile(NamedTuple):
    heads: slice
    rows: slice
    keys: slice
    diagonal: int
    """Tokens of the last square, which is masked above its diagonal; 0: nothing is masked."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Sequence[Piece],
    output: Tensor,
    lse: Tensor,
    dropout: Dropout | None = None,
) -> None:
    """Add a block of keys and values to ``output`` and ``lse``, in place.

    Args:
        query: ``[b·g, s·r, d]``, times the softmax scale.
        key: ``[b·g, s, d]``.
        value: likewise.
        pieces: which queries see which keys.
        output: ``[b·g, s·r, d]``; zeros before the first block.
        lse: ``[b·g, s·r, 1]``; ``-inf`` before the first block.
        dropout: None: nothing is dropped.
    """
    masks = _Masks(dropout, query.device)
    for tile in _tiles(query, key, pieces):
        scores = _scores(query, key, tile)
        highest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(highest).exp_()
        before = lse[tile.heads, tile.rows]
        after = torch.logaddexp(before, highest + weights.sum(-1, keepdim=True).log_())
        if dropout is not None:
            weights.mul_(masks.next(weights))
        added = torch.bmm(weights, value[tile.heads, tile.keys]).mul_(highest.sub_(after).exp_())
        output[tile.heads, tile.rows].mul_((before - after).exp_()).add_(added)
        before.copy_(after)


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Sequence[Piece],
    lse: Tensor,
    gradient: Tensor,
    projected: Tensor,
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    dropout: Dropout | None = None,
) -> None:
    """Add a block's part of the gradients to ``d_query``, ``d_key`` and ``d_value``, in place.

    Args:
        query: as in :func:`attend`.
        key: of this block.
        value: of this block.
        pieces: which queries see which keys.
        lse: of all blocks.
        gradient: of the output of all blocks, ``[b·g, s·r, d]``.
        projected: ``rowsum(gradient ⊙ output)``, ``[b·g, s·r, 1]``.
        d_query: of the scaled query.
        d_key: of this block.
        d_value: of this block.
        dropout: that of the forward pass.
    """
    masks = _Masks(dropout, query.device)
    for tile in _tiles(query, key, pieces):
        heads, rows, keys, _ = tile
        weights = _scores(query, key, tile).sub_(lse[heads, rows]).exp_()
        upstream = gradient[heads, rows]
        d_weights = torch.bmm(upstream, value[heads, keys].mT)
        kept = weights
        if dropout is not None:
            mask = masks.next(weights)
            kept = weights * mask
            d_weights.mul_(mask)
        d_value[heads, keys].baddbmm_(kept.mT, upstream)
        d_scores = d_weights.sub_(projected[heads, rows]).mul_(weights)
        d_query[heads, rows].baddbmm_(d_scores, key[heads, keys])
        d_key[heads, keys].baddbmm_(d_scores.mT, query[heads, rows])


def _tiles(query: Tensor, key: Tensor, pieces: Sequence[Piece]) -> Iterator[_Tile]:
    """Yield what is computed at once, always in the same order."""
    repeat = query.size(1) // key.size(1)
    step, most = max(1, ROWS // repeat), ELEMENTS[query.device.type]
    for (first, last), (first_key, last_key), causal in pieces:
        for start in range(first, last, step):
            end = min(start + step, last)
            keys = slice(first_key, first_key + end - first if causal else last_key)
            rows = slice(start * repeat, end * repeat)
            at_once = most // ((rows.stop - rows.start) * (keys.stop - keys.start)) or 1
            for head in range(0, key.size(0), at_once):
                yield _Tile(slice(head, head + at_once), rows, keys, (end - start) * causal)


def _scores(query: Tensor, key: Tensor, tile: _Tile) -> Tensor:
    """Return the scores of a tile, ``-inf`` where they are masked."""
    scores = torch.bmm(query[tile.heads, tile.rows], key[tile.heads, tile.keys].mT)
    if side := tile.diagonal:
        square = scores.unflatten(1, (side, -1))[..., -side:]  # [heads, tokens, r, keys]
        later = torch.ones(side, side, dtype=torch.bool, device=scores.device).triu_(1)
        square.masked_fill_(later[:, None], float("-inf"))
    return scores


class _Masks:
    """Draws what the weights of one tile after the other are multiplied with."""

    def __init__(self, dropout: Dropout | None, device: torch.device):
        if dropout is not None:
            self._kept = 1 - dropout.probability
            self._generator = torch.Generator(device).manual_seed(dropout.seed)

    def next(self, weights: Tensor) -> Tensor:
        mask = torch.empty_like(weights).bernoulli_(self._kept, generator=self._generator)
        return mask.div_(self._kept)
