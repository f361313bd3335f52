"""The linear scan that Mamba-2 and Mamba-3 share, by chunks, with a hand-written backward.

Per head, with ``r`` rows a token (1 for Mamba-2) and ``a_t`` the logarithm of a token's decay::

    H_t = exp(a_t)·H_{t-1} + w_t Σ_r v_{t,r} k_{t,r}ᵀ,   y_{t,r} = H_t q_{t,r} + D·v_{t,r}

Saved for the backward are the inputs and the state before each chunk. All else is computed again,
a few chunks at a time, so that it stays in cache and memory is linear in the length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nemo_megacpp.mixers.kernels.segment_decays import cut, log_decay_gradient, segment_decays

# What one array over a block of chunks may take for each of torch's threads: few enough bytes that
# a thread's part of a block stays in its core's cache, enough that starting the threads of an
# operation costs little beside it. No sum runs over blocks, so their number has no effect on the
# result.
_BLOCK_BYTES = 2**19


class _Inputs(NamedTuple):
    """What the scan saves; every tensor in chunks."""

    values: Tensor  # [b, c, q, h, r, p]
    keys: Tensor  # [b, c, q, g, r, n]
    queries: Tensor  # [b, c, q, g, r, n]
    log_decay: Tensor  # [b, c, q, h]
    weight: Tensor  # [b, c, q, h]
    diagonal: Tensor | None  # [b, c, q, h]
    D: Tensor | None  # [h] or [h, p]


class _Row:
    """Views of all chunks, made once, each cut into blocks of ``step`` chunks.

    Values are seen as ``[b, k, g, e, q, r, p]`` with ``e = h/g`` heads a group.
    """

    def __init__(self, inputs: _Inputs):
        batch, count, size, heads, rank, dim = inputs.values.shape
        groups, state = inputs.keys.shape[3], inputs.keys.shape[5]
        row = batch * heads * size * rank * max(dim, size * rank) * inputs.values.element_size()
        self.step = max(1, _BLOCK_BYTES * torch.get_num_threads() // row)
        self.sizes = (batch, groups, heads // groups, size, rank, dim, state)
        self.blocks = [
            slice(start, min(start + self.step, count)) for start in range(0, count, self.step)
        ]
        self.decays = segment_decays(_heads_first(inputs.log_decay).contiguous(), self.step)
        self.incoming, self.outgoing = (
            cut(x.view(batch, count, groups, -1, size, 1, 1), self.step)
            for x in (self.decays.incoming, self.decays.outgoing)
        )
        self.values, self.weight = self.by_head(inputs.values), self.of_token(inputs.weight)
        self.keys, self.queries = self.by_group(inputs.keys), self.by_group(inputs.queries)
        self.diagonal = None
        if inputs.diagonal is not None:
            self.diagonal = cut(_heads_first(inputs.diagonal), self.step)
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
        return cut(_heads_first(x), self.step)


class _Block:
    """A block of ``k`` chunks as operands of matrix products, ``m = b·k``."""

    def __init__(self, row: _Row, index: int):
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


class _ChunkScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        values: Tensor,
        keys: Tensor,
        queries: Tensor,
        log_decay: Tensor,
        weight: Tensor,
        diagonal: Tensor | None,
        D: Tensor | None,
        initial: Tensor | None,
        starts: Tensor | None,
        final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        inputs = _Inputs(values, keys, queries, log_decay, weight, diagonal, D)
        row = _Row(inputs)
        y = _empty(values)
        out = row.by_head(y)
        if initial is None and not final and values.shape[1] == 1:  # no state comes or goes
            part = _Block(row, 0)
            inside = part.by_head(torch.bmm(part.decayed_scores(), part.inputs))
            if row.D is not None:
                inside.addcmul_(part.values, row.D)
            out[0].copy_(inside)
            ctx.save_for_backward(*inputs, None, None)
            return y, None
        if initial is None:
            initial = values.new_zeros(
                values.shape[0], values.shape[3], values.shape[5], keys.shape[5]
            )
        resets = _resets(starts, values.shape[1])
        state = _state_by_group(initial, keys.shape[3])  # [b, g, n, e, p]
        before = state.new_empty(state.shape[0], values.shape[1] + 1, *state.shape[1:])
        before[:, 0] = state  # and the state after the last chunk is the last
        for index, block in enumerate(row.blocks):
            part = _Block(row, index)
            inside = part.by_head(torch.bmm(part.decayed_scores(), part.inputs))
            added = torch.bmm(part.keys.transpose(1, 2), part.at_end())
            added = added.view(-1, part.shape[1], *state.shape[1:])
            for i, c in enumerate(range(block.start, block.stop)):
                if resets[c] is not None:
                    before[:, c].masked_fill_(resets[c], 0)
                torch.addcmul(added[:, i], before[:, c], row.total[:, c], out=before[:, c + 1])
            read = torch.bmm(part.queries, before[:, block].reshape(-1, *_matrix(before)))
            if row.D is not None:
                inside.addcmul_(part.values, row.D)
            torch.addcmul(inside, part.from_groups(read), part.incoming, out=out[index])
        ctx.save_for_backward(*inputs, before, starts)
        return y, _state_by_head(before[:, -1]) if final else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_y: Tensor | None, grad_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *saved, before, starts = ctx.saved_tensors  # type: ignore[attr-defined]
        inputs = _Inputs(*saved)
        row = _Row(inputs)
        values, D = inputs.values, inputs.D
        grads = _Inputs(
            values=_empty(inputs.values),
            keys=_empty(inputs.keys),
            queries=_empty(inputs.queries),
            log_decay=_empty(inputs.log_decay),
            weight=_empty(inputs.weight),
            diagonal=None if inputs.diagonal is None else _empty(inputs.diagonal),
            # Of each chunk by itself, [b, c, h, p]: no sum runs over blocks.
            D=None if D is None else _empty(values[:, :, 0, :, 0]),
        )
        grad_values = row.by_head(grads.values)
        grad_keys, grad_queries = row.by_group(grads.keys), row.by_group(grads.queries)
        grad_weight, grad_log_decay = _heads_first(grads.weight), _heads_first(grads.log_decay)
        grad_rows = row.by_head(torch.zeros_like(values) if grad_y is None else grad_y)
        states = None
        if before is not None:
            resets = _resets(starts, values.shape[1])
            if grad_final is None:
                state = torch.zeros_like(before[:, 0])
            else:
                state = _state_by_group(grad_final, inputs.keys.shape[3])
            states = _States(row, before, resets, state)
        for index, block in reversed(list(enumerate(row.blocks))):
            part = _Block(row, index)
            grad = grad_rows[index]
            grad_heads = grad.contiguous().view(-1, part.rows, grad.shape[-1])

            # Inside chunks: the gradient of scores times decays, and what it gives to both.
            grad_inputs = torch.bmm(part.decayed_scores().transpose(1, 2), grad_heads)
            grad_inner = torch.bmm(grad_heads, part.inputs.transpose(1, 2))
            if grads.diagonal is not None:
                _heads_first(grads.diagonal[:, block]).copy_(part.on_diagonal(grad_inner))
            part.decay(grad_inner)
            grad_scores = part.over_heads(grad_inner)
            of_queries = torch.bmm(grad_scores, part.keys)
            of_keys = torch.bmm(grad_scores.transpose(1, 2), part.queries)
            grad_log_inner = part.times_scores(grad_inner)  # overwrites the scores' gradient
            of_inputs = part.by_head(grad_inputs)

            of_decays = None
            if states is not None:
                of_decays = states.block_backward(part, block, grad, of_queries, of_keys, of_inputs)
            grad_queries[index].copy_(of_queries.view(grad_queries[index].shape))
            grad_keys[index].copy_(of_keys.view(grad_keys[index].shape))
            to = grad_values[index]
            torch.mul(of_inputs, part.weight, out=to)
            if row.D is not None and grads.D is not None:
                to.addcmul_(grad, row.D)
                grads.D[:, block] = (grad * part.values).sum(dim=(4, 5)).flatten(2, 3)
            of_weight = of_inputs.mul_(part.values).sum(dim=(-2, -1))
            grad_weight[:, block] = of_weight.flatten(2, 3)
            grad_log_decay[:, block] = log_decay_gradient(grad_log_inner, of_decays)
        if grads.D is not None and D is not None:
            grad_D = grads.D.sum(dim=(0, 1))
            grads = grads._replace(D=grad_D.sum(dim=-1) if D.dim() == 1 else grad_D)
        grad_initial = None
        if states is not None and ctx.needs_input_grad[7]:  # type: ignore[attr-defined]
            grad_initial = _state_by_head(states.grad)
        return *grads, grad_initial, None, None


class _States(NamedTuple):
    """What the backward needs of the states between chunks.

    Attributes:
        before: ``[b, c + 1, g, n, e, p]``, the state before each chunk.
        resets: as :func:`_resets` returns them.
        grad: ``[b, g, n, e, p]``, the gradient of the state after the current block; overwritten.
    """

    row: _Row
    before: Tensor
    resets: list[Tensor | None]
    grad: Tensor

    def block_backward(
        self,
        part: _Block,
        block: slice,
        grad: Tensor,
        of_queries: Tensor,
        of_keys: Tensor,
        of_inputs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add what a block's gradients get through the states, from its last chunk to its first.

        Args:
            grad: of the output, as values.
            of_queries: ``[m·g, q·r, n]``, added to; so are of_keys and of_inputs (as values).

        Returns:
            The gradients of the logarithms of the block's decays: from before a chunk, to its end
            (``[b, k, h, q]`` each) and over it (``[b, k, h]``).
        """
        row, before = self.row, self.before[:, block]
        grad_read = part.per_group(grad, part.incoming)  # [m·g, q·r, e·p]
        states = before.reshape(-1, *_matrix(before))  # [m·g, n, e·p]
        grad_before = torch.bmm(part.queries.transpose(1, 2), grad_read).view(before.shape)
        grad_added = torch.empty_like(grad_before)
        grad_added[:, -1] = self.grad
        for c in range(block.stop - 1, block.start - 1, -1):
            i = c - block.start
            to = grad_added[:, i - 1] if i else self.grad
            torch.addcmul(grad_before[:, i], grad_added[:, i], row.total[:, c], out=to)
            reset = self.resets[c]
            if reset is not None:
                to.masked_fill_(reset, 0)
        torch.mul(grad_added, before, out=grad_before)
        grad_total = grad_before.sum(dim=(-3, -1)).flatten(2)
        grad_total *= row.decays.total()[:, block]
        grad_added = grad_added.view(states.shape)
        weighted = part.at_end()
        of_queries.baddbmm_(grad_read, states.transpose(1, 2))
        of_keys.baddbmm_(weighted, grad_added.transpose(1, 2))
        grad_incoming = part.over_rows(grad_read.mul_(torch.bmm(part.queries, states)))
        later = torch.bmm(part.keys, grad_added)
        grad_outgoing = part.over_rows(weighted.mul_(later))
        of_inputs.addcmul_(part.from_groups(later), part.outgoing)
        return grad_incoming, grad_outgoing, grad_total


def _heads_first(x: Tensor) -> Tensor:
    """``[b, c, q, h, ...]`` as ``[b, c, h, q, ...]``."""
    return x.transpose(2, 3)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _state_by_group(state: Tensor, groups: int) -> Tensor:
    """``[b, h, p, n]`` as ``[b, g, n, h/g, p]``, for products of all heads of a group at once."""
    return state.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).contiguous()


def _state_by_head(state: Tensor) -> Tensor:
    return state.permute(0, 1, 3, 4, 2).flatten(1, 2)


def _matrix(states: Tensor) -> tuple[int, int]:
    """The sizes ``n, h/g·p`` of states ``[..., n, h/g, p]``."""
    return states.shape[-3], states.shape[-2] * states.shape[-1]


def _resets(starts: Tensor | None, count: int) -> list[Tensor | None]:
    """For each chunk, the rows ``[b, 1, 1, 1, 1]`` whose state it must not see, None for none."""
    if starts is None:
        return [None] * count
    any_row = starts.any(dim=0).tolist()
    return [starts[:, c, None, None, None, None] if any_row[c] else None for c in range(count)]


def chunk_scan(
    values: Tensor,
    keys: Tensor,
    queries: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    *,
    diagonal: Tensor | None = None,
    D: Tensor | None = None,
    initial: Tensor | None = None,
    starts: Tensor | None = None,
    final: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Scan rows that are cut into chunks (:mod:`nemo_megacpp.mixers.kernels.chunks`).

    No sum crosses heads but that of a group for the gradients of its keys and queries, and a
    state is set to zero where a document starts, never multiplied by zero.

    Args:
        values: ``[b, c, q, h, r, p]``; all tensors have one dtype.
        keys: ``[b, c, q, g, r, n]``; so is queries.
        log_decay: ``[b, c, q, h]``, ``a``, at most zero; zero in slots without a token.
        weight: ``[b, c, q, h]``, of each token's input.
        diagonal: ``[b, c, q, h]``; a token reads its own input with this factor instead of 1.
        D: ``[h]`` or ``[h, p]``, the skip weight.
        initial: ``[b, h, p, n]``; zero if None.
        starts: bool ``[b, c]``: the state before these chunks is zero.
        final: also return the last state. Without it, a row of one chunk that starts from zero
            has no states to compute.

    Returns:
        ``y [b, c, q, h, r, p]`` and the state ``[b, h, p, n]`` after the last token, or None.
    """
    if initial is not None:
        initial = initial.to(values.dtype)
    y, state = _ChunkScan.apply(
        values, keys, queries, log_decay, weight, diagonal, D, initial, starts, final
    )
    return y, state
