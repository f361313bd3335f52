"""Blocks of attention, added up in the order of a ring, against a softmax written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_megacpp.mixers.kernels import block_attention
from nemo_megacpp.mixers.kernels.block_attention import Dropout, attend, attend_backward
from nemo_megacpp.mixers.ring_attention import pieces_of
from nemo_megacpp.mixers.sequence_layout import TokenOrder

TOLERANCE = 1e-13
"""Of the largest value, in float64."""


def _random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _written_out(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """``[heads, s, r, d]`` queries on ``[heads, s, d]`` keys: row by row."""
    rows = []
    for token in range(query.size(1)):
        k, v = key[:, seen[token]], value[:, seen[token]]
        weights = torch.softmax(query[:, token] @ k.mT, dim=-1)
        rows.append(weights @ v)
    return torch.stack(rows, dim=1)


def _seen(order: TokenOrder) -> Tensor:
    """Return which keys each token of a row in order sees."""
    tokens = torch.arange(order.boundaries[-1])
    seen = tokens[:, None] >= tokens
    if order.documents is not None:
        seen &= order.documents[:, None] == order.documents
    return seen


def _in_ring(
    order: TokenOrder, query: Tensor, key: Tensor, value: Tensor, form: Tensor, seed: int = -1
) -> list[Tensor]:
    """Return output and gradients, computed share by share and block by block; with a ``seed``,
    half of the weights are dropped."""
    cp, (heads, _, repeat, dim) = order.cp, query.shape
    found = [torch.zeros_like(t) for t in (query, query, key, value)]
    for rank in range(cp):
        mine = order.of_rank(rank)
        rows, upstream = (t[:, mine].reshape(heads, -1, dim) for t in (query, form))
        output, d_rows = torch.zeros_like(rows), torch.zeros_like(rows)
        lse = torch.full((heads, rows.size(1), 1), float("-inf"), dtype=rows.dtype)
        blocks = []
        for step in range(cp):
            source = (rank - step) % cp
            theirs = order.of_rank(source)
            dropout = None if seed < 0 else Dropout(0.5, seed + rank * cp + source)
            blocks.append((theirs, pieces_of(order, rank, source), dropout))
            k, v = key[:, theirs], value[:, theirs]
            attend(rows, k, v, blocks[-1][1], output, lse, dropout)
        projected = (upstream * output).sum(-1, keepdim=True)
        for theirs, pieces, dropout in blocks:
            k, v = key[:, theirs], value[:, theirs]
            d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
            attend_backward(
                *(rows, k, v, pieces, lse, upstream, projected, d_rows, d_k, d_v, dropout)
            )
            found[2].index_add_(1, theirs, d_k)
            found[3].index_add_(1, theirs, d_v)
        for whole, part in zip(found, (output, d_rows), strict=False):
            whole[:, mine] = part.unflatten(1, (-1, repeat))
    return found


CASES = [
    (1, (0, 13), 3, 1, 5),
    (2, (0, 28), 2, 7, 6),
    (3, (0, 42), 1, 7, 3),
    (4, (0, 40), 2, 2, 8),
    (2, (0, 4, 4, 32), 2, 7, 5),
    (3, (0, 6, 24, 54), 3, 1, 4),
    (4, (0, 8, 32, 56), 1, 3, 5),
]


@pytest.mark.parametrize("rows", [1, 5, 256])
@pytest.mark.parametrize(("cp", "bounds", "heads", "repeat", "dim"), CASES)
def test_against_softmax(
    monkeypatch: pytest.MonkeyPatch,
    cp: int,
    bounds: tuple[int, ...],
    heads: int,
    repeat: int,
    dim: int,
    rows: int,
) -> None:
    """In tiles of several sizes, of all heads or of one."""
    monkeypatch.setattr(block_attention, "ROWS", rows)
    monkeypatch.setitem(block_attention.ELEMENTS, "cpu", rows * 16)
    order, length = TokenOrder(bounds, cp, torch.device("cpu")), bounds[-1]
    query, form = (_random(seed, heads, length, repeat, dim) for seed in (0, 3))
    key, value = (_random(seed, heads, length, dim) for seed in (1, 2))
    found = _in_ring(order, query, key, value, form)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    output = _written_out(query, key, value, _seen(order))
    expected = [output.detach(), *torch.autograd.grad((output * form).sum(), inputs)]
    for name, one, other in zip(("output", "q", "k", "v"), found, expected, strict=True):
        assert (one - other).abs().max() <= TOLERANCE * other.abs().max(), name


def test_heads_of_a_rank_have_the_bits_of_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TP splits them; some tiles hold all heads, some one."""
    order = TokenOrder((0, 200, 512), 2, torch.device("cpu"))
    tensors = [_random(seed, 4, 512, 7, 24).float() for seed in (0, 3)]
    keys = [_random(seed, 4, 512, 24).float() for seed in (1, 2)]
    monkeypatch.setitem(block_attention.ELEMENTS, "cpu", 2**16)
    query, form = tensors
    whole = _in_ring(order, query, *keys, form)
    for head in range(4):
        one = _in_ring(order, *(t[head : head + 1] for t in (query, *keys, form)))
        for part, of_all in zip(one, whole, strict=True):
            assert torch.equal(part[0], of_all[head])


def test_dropout() -> None:
    """The weights that are kept count double, the same ones in both passes."""
    order = TokenOrder((0, 16), 2, torch.device("cpu"))
    query, form = (_random(seed, 2, 16, 3, 4) for seed in (0, 3))
    key = _random(1, 2, 16, 4)
    # With the identity as values, the output is the weights.
    eye = torch.eye(16, dtype=torch.float64).expand(2, 16, 16)
    wide = torch.zeros(2, 16, 3, 16, dtype=torch.float64)
    wide[..., :4], long = query, torch.zeros(2, 16, 16, dtype=torch.float64)
    long[..., :4] = key
    weights = _written_out(query, key, eye, _seen(order))
    mask = _in_ring(order, wide, long, eye, wide, seed=5)[0] / weights
    assert set(mask[~mask.isnan()].round(decimals=9).unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (mask[weights > 0] > 0).double().mean() < 0.6

    value = _random(2, 2, 16, 4)
    found = _in_ring(order, query, key, value, form, seed=5)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    scores = torch.einsum("hsrd,htd->hsrt", query, key)
    scores = scores.masked_fill(~_seen(order)[:, None], float("-inf"))
    output = torch.einsum("hsrt,htd->hsrd", scores.softmax(-1) * mask.nan_to_num(0.0), value)
    expected = [output.detach(), *torch.autograd.grad((output * form).sum(), inputs)]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= TOLERANCE * other.abs().max()
