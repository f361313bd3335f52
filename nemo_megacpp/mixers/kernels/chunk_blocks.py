"""The chunks of a scan as operands of matrix products, a block of chunks at a time.

Views and products that forward and backward of :mod:`nemo_megacpp.mixers.kernels.chunk_scan` share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_megacpp.mixers.kernels.segment_decays import cut, segment_decays

# What one array over a block of chunks may take for each of torch's threads: few enough bytes that
# a thread's part of a block stays in its core's cache, enough that starting the threads of an
# operation costs little beside it. No sum runs over blocks, so their number has no effect on the
# result.
_BLOCK_BYTES = 2**19


class ScanInputs(NamedTuple):
    """What the scan saves; every tensor in chunks."""

    values: Tensor  # [b, c, q, h, r, p]
    keys: Tensor  # [b, c, q, g, r, n]
    queries: Tensor  # [b, c, q, g, r, n]
    log_decay: Tensor  # [b, c, q, h]
    weight: Tensor  # [b, c, q, h]
    diagonal: Tensor | None  # [b, c, q, h]
    D: Tensor | None  # [h] or [h, p]


class ScanRow:
    """Views of all chunks, made once, each cut into blocks of ``step`` chunks.

    Values are seen as ``[b, k, g, e, q, r, p]`` with ``e = h/g`` heads a group.
    """

    def __init__(self, inputs: ScanInputs):
        batch, count, size, heads, rank, dim = inputs.values.shape
        groups, state = inputs.keys.shape[3], inputs.keys.shape[5]
        row = batch * heads * size * rank * max(dim, size * rank) * inputs.values.element_size()
        self.step = max(1, _BLOCK_BYTES * torch.get_num_threads() // row)
        self.sizes = (batch, groups, heads // groups, size, rank, dim, state)
        self.blocks = [
            slice(start, min(start + self.step, count)) for start in range(0, count, self.step)
        ]
        self.decays = segment_decays(heads_first(inputs.log_decay).contiguous(), self.step)
        self.incoming, self.outgoing = (
            cut(x.view(batch, count, groups, -1, size, 1, 1), self.step)
            for x in (self.decays.incoming, self.decays.outgoing)
        )
        self.values, self.weight = self.by_head(inputs.values), self.of_token(inputs.weight)
        self.keys, self.queries = self.by_group(inputs.keys), self.by_group(inputs.queries)
        self.diagonal = None
        if inputs.diagonal is not None:
            self.diagonal = cut(heads_first(inputs.diagonal), self.step)
        # [b, c, g, 1, e, 1] against states [b, c, g, n, e, p].
        self.total = self.decays.total().view(batch, count, groups, 1, -1, 1)
        # [g, e, 1, 1, 1 or p] against values.
        self.D = None if inputs.D is None else inputs.D.view(*self.sizes[1:3], 1, 1, -1)

    def by_head(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[b, c, q, h, r, p]`` as values."""
        batch, groups, heads, size, rank, dim, _ = self.sizes
        x = x.view(batch, -1, size, groups, heads, rank, dim).permute(0, 1, 3, 4, 2, 5, 6)
        return cut(x, self.step)

    def of_token(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[b, c, q, h]`` against values."""
        batch, groups, heads, size, *_ = self.sizes
        x = x.view(batch, -1, size, groups, heads, 1, 1).permute(0, 1, 3, 4, 2, 5, 6)
        return cut(x, self.step)

    def by_group(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[b, c, q, g, r, n]`` as ``[b, k, g, q, r, n]``."""
        return cut(heads_first(x), self.step)


class ScanBlock:
    """A block of ``k`` chunks as operands of matrix products, ``m = b·k``."""

    def __init__(self, row: ScanRow, index: int):
        batch, groups, heads, size, rank, dim, state = row.sizes
        self.values, self.weight = row.values[index], row.weight[index]
        self.incoming, self.outgoing = row.incoming[index], row.outgoing[index]
        count = self.values.shape[1]
        self.rows = size * rank
        self.shape = (batch, count, groups, heads, size, rank)
        self.grouped = (batch, count, groups, size, rank, heads, dim)
        self.keys, self.queries = (
            x[index].reshape(-1, self.rows, state) for x in (row.keys, row.queries)
        )  # [m·g, q·r, n]
        self.inner = row.decays.inner.of(index, row.diagonal and row.diagonal[index])
        self.scores = torch.bmm(self.queries, self.keys.transpose(1, 2))  # [m·g, q·r, q·r]
        self.inputs = self.per_head(self.values, self.weight)

    def per_head(self, x: Tensor, factor: Tensor) -> Tensor:
        """``x [b, k, g, e, q, r, p] · factor`` as matrices ``[m·h, q·r, p]``."""
        out = x.new_empty(x.shape)
        return torch.mul(x, factor, out=out).view(-1, self.rows, x.shape[-1])

    def per_group(self, x: Tensor, factor: Tensor) -> Tensor:
        """``x [b, k, g, e, q, r, p] · factor``, the heads of a group side by side:
        ``[m·g, q·r, e·p]``."""
        out = x.new_empty(self.grouped)
        torch.mul(x, factor, out=out.permute(0, 1, 2, 5, 3, 4, 6))
        return out.view(-1, self.rows, self.grouped[-2] * self.grouped[-1])

    def at_end(self) -> Tensor:
        """The inputs, decayed to the end of their chunk: ``[m·g, q·r, e·p]``."""
        return self.per_group(self.by_head(self.inputs), self.outgoing)

    def by_head(self, x: Tensor) -> Tensor:
        """Undo :meth:`per_head`; a view."""
        return x.view(*self.shape, x.shape[-1])

    def from_groups(self, x: Tensor) -> Tensor:
        """``[m·g, q·r, e·p]`` as ``[b, k, g, e, q, r, p]``, a view."""
        return x.view(self.grouped).permute(0, 1, 2, 5, 3, 4, 6)

    def over_rows(self, x: Tensor) -> Tensor:
        """Sum ``[m·g, q·r, e·p]`` over the rows of a token and ``p``: ``[b, k, h, q]``."""
        batch, count, groups, heads, size, _ = self.shape
        return (
            x.view(self.grouped)
            .sum(dim=(4, 6))
            .transpose(3, 4)
            .reshape(batch, count, groups * heads, size)
        )

    def decayed_scores(self) -> Tensor:
        """The scores times the decays inside chunks: ``[m·h, q·r, q·r]``."""
        return self._decayed(self.scores, 1, None)

    def decay(self, x: Tensor) -> None:
        """Multiply ``x [m·h, q·r, q·r]`` by the decays inside chunks, in place."""
        self._decayed(x, self.shape[3], x)

    def _decayed(self, x: Tensor, heads: int, out: Tensor | None) -> Tensor:
        batch, count, groups, all_heads, size, rank = self.shape
        full = (batch, count, groups, all_heads, size, rank, size, rank)
        out = x.new_empty(full) if out is None else out.view(full)
        torch.mul(
            x.view(batch, count, groups, heads, size, rank, size, rank),
            self.inner.view(batch, count, groups, all_heads, size, 1, size, 1),
            out=out,
        )
        return out.view(-1, self.rows, self.rows)

    def times_scores(self, x: Tensor) -> Tensor:
        """Multiply ``x [m·h, q·r, q·r]`` by the scores in place; ``[b, k, h, q, q]``, summed over
        the rows of a token."""
        batch, count, groups, heads, size, rank = self.shape
        x.view(-1, heads, self.rows, self.rows).mul_(self.scores.unsqueeze(1))
        if rank > 1:
            x = x.view(-1, size, rank, size, rank).sum(dim=(-3, -1))
        return x.view(batch, count, groups * heads, size, size)

    def on_diagonal(self, x: Tensor) -> Tensor:
        """The product of ``x [m·h, q·r, q·r]`` and scores, summed over the rows of each token with
        themselves: ``[b, k, h, q]``."""
        batch, count, groups, heads, size, rank = self.shape
        own, scores = (
            y.view(batch * count * groups, -1, size, rank, size, rank).diagonal(dim1=2, dim2=4)
            for y in (x, self.scores)
        )
        return (own * scores).sum(dim=(2, 3)).view(batch, count, groups * heads, size)

    def over_heads(self, x: Tensor) -> Tensor:
        """Sum ``[m·h, q·r, q·r]`` over the heads of each group: ``[m·g, q·r, q·r]``."""
        heads = self.shape[3]
        return x if heads == 1 else x.view(-1, heads, self.rows, self.rows).sum(dim=1)


def heads_first(x: Tensor) -> Tensor:
    """``[b, c, q, h, ...]`` as ``[b, c, h, q, ...]``."""
    return x.transpose(2, 3)
