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

from nemo_megacpp.mixers.kernels.segment_decays import (
    SegmentDecays,
    log_decay_gradient,
    segment_decays,
)

# What one array over a block of chunks may take: few enough bytes to stay in cache. No sum runs
# over blocks, so the number of chunks in one has no effect on the result.
_BLOCK_BYTES = 2**20


class _Inputs(NamedTuple):
    """What the scan saves; every tensor in chunks."""

    values: Tensor  # [b, c, q, h, r, p]
    keys: Tensor  # [b, c, q, g, r, n]
    queries: Tensor  # [b, c, q, g, r, n]
    log_decay: Tensor  # [b, c, q, h]
    weight: Tensor  # [b, c, q, h]
    diagonal: Tensor | None  # [b, c, q, h]
    D: Tensor | None  # [h] or [h, p]

    def blocks(self) -> list[slice]:
        batch, count, size, heads, rank, dim = self.values.shape
        row = batch * heads * size * rank * max(dim, size * rank) * self.values.element_size()
        step = max(1, _BLOCK_BYTES // row)
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class _Block:
    """A block of ``k`` chunks as operands of matrix products, ``m = b·k``."""

    def __init__(self, inputs: _Inputs, decays: SegmentDecays, block: slice):
        self.values = _heads_first(inputs.values[:, block])  # [b, k, h, q, r, p], a view
        batch, count, heads, size, rank, self.dim = self.values.shape
        groups = inputs.keys.shape[3]
        self.shape = (batch, count, groups, heads // groups, size, rank)
        self.rows = size * rank
        self.keys, self.queries = (
            _heads_first(x[:, block]).reshape(-1, self.rows, x.shape[-1])
            for x in (inputs.keys, inputs.queries)
        )  # [m·g, q·r, n]
        self.incoming, self.outgoing = decays.incoming[:, block], decays.outgoing[:, block]
        self.weight = inputs.weight[:, block].transpose(2, 3)  # [b, k, h, q], as the two above
        self.inputs = _product(self.values, self.weight[..., None, None])
        diagonal = inputs.diagonal
        if diagonal is not None:
            diagonal = diagonal[:, block].transpose(2, 3)
        self.inner = decays.inner.of(block, diagonal)  # [b, k, h, q, q]
        self.scores = self.queries @ self.keys.transpose(1, 2)  # [m·g, q·r, q·r]

    def per_head(self, x: Tensor) -> Tensor:
        """``[b, k, h, q, r, ·]`` as matrices ``[m·h, q·r, ·]``."""
        return x.view(-1, self.rows, x.shape[-1])

    def decayed(self, x: Tensor) -> Tensor:
        """``x [m·g or m·h, q·r, q·r]`` times the decays inside chunks: ``[m·h, q·r, q·r]``."""
        batch, count, groups, heads, size, rank = self.shape
        inner = self.inner.view(batch, count, groups, heads, size, 1, size, 1)
        full = x.view(batch, count, groups, -1, size, rank, size, rank)
        return _product(full, inner).view(-1, self.rows, self.rows)

    def times_scores(self, x: Tensor) -> Tensor:
        """Multiply ``x [m·h, q·r, q·r]`` by the scores in place; ``[b, k, h, q, q]``, summed over
        the rows of a token."""
        batch, count, groups, heads, size, rank = self.shape
        x.view(-1, heads, self.rows, self.rows).mul_(self.scores[:, None])
        by_token = x.view(batch, count, groups * heads, size, rank, size, rank)
        return by_token.sum(dim=(-3, -1)) if rank > 1 else by_token[..., 0, :, 0]

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

    def per_group(self, x: Tensor, factor: Tensor) -> Tensor:
        """``x [b, k, h, q, r, p]`` times ``factor [b, k, h, q]``, the heads of a group side by
        side: ``[m·g, q·r, h/g·p]``."""
        groups = self.shape[2:4]
        product = _product(
            x.unflatten(2, groups).movedim(3, 5),
            factor[..., None, None].unflatten(2, groups).movedim(3, 5),
        )
        return product.view(-1, self.rows, groups[1] * self.dim)

    def from_groups(self, x: Tensor) -> Tensor:
        """``[m·g, q·r, h/g·p]`` as ``[b, k, h, q, r, p]``, a view of the memory where it can."""
        batch, count, groups, heads, size, rank = self.shape
        by_group = x.view(batch, count, groups, size, rank, heads, self.dim)
        return by_group.movedim(5, 3).flatten(2, 3)


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
        initial: Tensor,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = _Inputs(values, keys, queries, log_decay, weight, diagonal, D)
        decays = segment_decays(_heads_first(log_decay).contiguous())
        resets = _resets(starts, values.shape[1])
        y = _empty(values)
        state = _state_by_group(initial, keys.shape[3])  # [b, g, n, h/g, p]
        before = state.new_empty(state.shape[0], values.shape[1] + 1, *state.shape[1:])
        before[:, 0] = state  # and the state after the last chunk is the last
        total = _factor_of_state(decays, keys.shape[3])
        for block in inputs.blocks():
            part = _Block(inputs, decays, block)
            inside = part.decayed(part.scores) @ part.per_head(part.inputs)
            added = part.keys.transpose(1, 2) @ part.per_group(part.inputs, part.outgoing)
            added = added.view(before[:, block].shape).unbind(1)
            for c, more in zip(range(block.start, block.stop), added, strict=True):
                if resets[c] is not None:
                    before[:, c].masked_fill_(resets[c], 0)
                torch.addcmul(more, before[:, c], total[:, c], out=before[:, c + 1])
            read = part.queries @ before[:, block].reshape(-1, *_matrix(before))
            out = _heads_first(y[:, block])
            read = part.from_groups(read)
            torch.mul(read, part.incoming[..., None, None], out=out)
            out += inside.view(out.shape)
            if D is not None:
                out.addcmul_(part.values, _of_head(D))
        ctx.save_for_backward(*inputs, before, starts)
        return y, _state_by_head(before[:, -1])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        *saved, before, starts = ctx.saved_tensors  # type: ignore[attr-defined]
        inputs = _Inputs(*saved)
        values, keys, D = inputs.values, inputs.keys, inputs.D
        decays = segment_decays(_heads_first(inputs.log_decay).contiguous())
        resets = _resets(starts, values.shape[1])
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
        state = _state_by_group(grad_final, keys.shape[3])
        total = _factor_of_state(decays, keys.shape[3])
        for block in reversed(inputs.blocks()):
            part = _Block(inputs, decays, block)
            grad = _heads_first(grad_y[:, block])
            grad_heads = part.per_head(grad.contiguous())
            grad_read = part.per_group(grad, part.incoming)  # [m·g, q·r, h/g·p]
            states = before[:, block].reshape(-1, *_matrix(before))  # [m·g, n, h/g·p]
            weighted = part.per_group(part.inputs, part.outgoing)

            # The state, from the last chunk to the first.
            grad_before = (part.queries.transpose(1, 2) @ grad_read).view(before[:, block].shape)
            grad_added = torch.empty_like(grad_before)
            grad_added[:, -1] = state
            for c in range(block.stop - 1, block.start - 1, -1):
                i = c - block.start
                to = grad_added[:, i - 1] if i else state
                torch.addcmul(grad_before[:, i], grad_added[:, i], total[:, c], out=to)
                if resets[c] is not None:
                    to.masked_fill_(resets[c], 0)
            grad_total = (grad_added * before[:, block]).sum(dim=(-3, -1)).flatten(2)
            grad_total *= decays.total()[:, block]
            grad_added = grad_added.view(states.shape)

            # Inside chunks: the gradient of scores times decays, and what it gives to both.
            grad_inputs = part.decayed(part.scores).transpose(1, 2) @ grad_heads
            grad_inner = grad_heads @ part.per_head(part.inputs).transpose(1, 2)
            if grads.diagonal is not None:
                _heads_first(grads.diagonal[:, block]).copy_(part.on_diagonal(grad_inner))
            grad_inner = part.decayed(grad_inner)
            grad_scores = part.over_heads(grad_inner)
            grad_queries = grad_scores @ part.keys
            grad_queries.baddbmm_(grad_read, states.transpose(1, 2))
            grad_keys = grad_scores.transpose(1, 2) @ part.queries
            grad_keys.baddbmm_(weighted, grad_added.transpose(1, 2))
            grad_log_inner = part.times_scores(grad_inner)  # overwrites the scores' gradient
            for name, x in (("queries", grad_queries), ("keys", grad_keys)):
                to = _heads_first(getattr(grads, name)[:, block])
                to.copy_(x.view(to.shape))

            read = part.from_groups(part.queries @ states).mul_(grad)
            grad_incoming = read.sum(dim=(-2, -1)).mul_(part.incoming)
            later = _product(
                part.from_groups(part.keys @ grad_added), part.outgoing[..., None, None]
            )
            grad_outgoing = (later * part.values).sum(dim=(-2, -1)).mul_(part.weight)
            later += grad_inputs.view(later.shape)
            to = _heads_first(grads.values[:, block])
            torch.mul(later, part.weight[..., None, None], out=to)
            if D is not None and grads.D is not None:
                to.addcmul_(grad, _of_head(D))
                grads.D[:, block] = (grad * part.values).sum(dim=(3, 4))
            _heads_first(grads.weight[:, block]).copy_(later.mul_(part.values).sum(dim=(-2, -1)))
            _heads_first(grads.log_decay[:, block]).copy_(
                log_decay_gradient(grad_log_inner, grad_incoming, grad_outgoing, grad_total)
            )
        if grads.D is not None and D is not None:
            grad_D = grads.D.sum(dim=(0, 1))
            grads = grads._replace(D=grad_D.sum(dim=-1) if D.dim() == 1 else grad_D)
        return *grads, _state_by_head(state), None


def _heads_first(x: Tensor) -> Tensor:
    """``[b, c, q, h, ...]`` as ``[b, c, h, q, ...]``."""
    return x.transpose(2, 3)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``x · y`` in contiguous memory, whatever the order of theirs."""
    return torch.mul(x, y, out=x.new_empty(torch.broadcast_shapes(x.shape, y.shape)))


def _of_head(D: Tensor) -> Tensor:
    """``[h]`` or ``[h, p]`` against ``[b, k, h, q, r, p]``."""
    return (D if D.dim() == 2 else D[:, None])[:, None, None]


def _state_by_group(state: Tensor, groups: int) -> Tensor:
    """``[b, h, p, n]`` as ``[b, g, n, h/g, p]``, for products of all heads of a group at once."""
    return state.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).contiguous()


def _state_by_head(state: Tensor) -> Tensor:
    return state.permute(0, 1, 3, 4, 2).flatten(1, 2)


def _factor_of_state(decays: SegmentDecays, groups: int) -> Tensor:
    """The decay over each chunk, ``[b, c, g, 1, h/g, 1]``."""
    return decays.total().unflatten(2, (groups, 1, -1))[..., None]


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
) -> tuple[Tensor, Tensor]:
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

    Returns:
        ``y [b, c, q, h, r, p]`` and the state ``[b, h, p, n]`` after the last token.
    """
    if initial is None:
        shape = (values.shape[0], values.shape[3], values.shape[5], keys.shape[5])
        initial = values.new_zeros(shape)
    y, final = _ChunkScan.apply(
        values, keys, queries, log_decay, weight, diagonal, D, initial.to(values.dtype), starts
    )
    return y, final
