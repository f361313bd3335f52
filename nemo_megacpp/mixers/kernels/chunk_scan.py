"""The linear scan that Mamba-2 and Mamba-3 share, by chunks, with a hand-written backward.

Per head, with ``r`` rows a token (1 for Mamba-2) and ``a_t`` the logarithm of a token's decay::

    H_t = exp(a_t)·H_{t-1} + w_t Σ_r v_{t,r} k_{t,r}ᵀ,   y_{t,r} = H_t q_{t,r} + D·v_{t,r}

Saved for the backward are the inputs and the states before each chunk and after the last. All else
is computed again, a few chunks at a time (:mod:`nemo_megacpp.mixers.kernels.chunk_blocks`), so that
it stays in cache and memory is linear in the length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nemo_megacpp.mixers.kernels.chunk_blocks import ScanBlock, ScanInputs, ScanRow, heads_first
from nemo_megacpp.mixers.kernels.segment_decays import log_decay_gradient


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
        inputs = ScanInputs(values, keys, queries, log_decay, weight, diagonal, D)
        row = ScanRow(inputs)
        y = _empty(values)
        out = row.by_head(y)
        if initial is None and not final and values.shape[1] == 1:  # no state comes or goes
            part = ScanBlock(row, 0)
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
            part = ScanBlock(row, index)
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
        inputs = ScanInputs(*saved)
        row = ScanRow(inputs)
        values, D = inputs.values, inputs.D
        grads = ScanInputs(
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
        grad_weight, grad_log_decay = heads_first(grads.weight), heads_first(grads.log_decay)
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
            part = ScanBlock(row, index)
            grad = grad_rows[index]
            grad_heads = grad.contiguous().view(-1, part.rows, grad.shape[-1])

            # Inside chunks: the gradient of scores times decays, and what it gives to both.
            grad_inputs = torch.bmm(part.decayed_scores().transpose(1, 2), grad_heads)
            grad_inner = torch.bmm(grad_heads, part.inputs.transpose(1, 2))
            if grads.diagonal is not None:
                heads_first(grads.diagonal[:, block]).copy_(part.on_diagonal(grad_inner))
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

    row: ScanRow
    before: Tensor
    resets: list[Tensor | None]
    grad: Tensor

    def block_backward(
        self,
        part: ScanBlock,
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
