"""The M²RNN recurrence with a hand-written backward, few operations a token.

Inside, a state is kept as ``[b·g, v, k]`` for all rows and ``g`` heads at a time, few enough to
stay in a core's cache from token to token. What does not depend on the previous token is done for
a block of tokens at once. Every row and head is computed by itself; only the gradients of a query
or key that heads share sum over heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# What the states of one token may take for each of torch's threads: with what the recurrence
# computes from them they then stay in a core's L2 cache. Every operation of a token may start the
# threads, so there must be work in it for all: two on half of the heads would start them twice.
_STATE_BYTES = 2**17
# exp() of more overflows float32; tanh is 1 to its last digit long before.
_EXP_LIMIT = 80.0


class _Group(NamedTuple):
    """The inputs of some heads; per-token tensors broadcast against states ``[l, b, g, v, k]``."""

    q: Tensor  # [l, b, 1 or g, 1, k]
    k: Tensor  # [l, b, 1 or g, 1, k]
    v: Tensor  # [l, b, g, v, 1]
    f: Tensor  # [l, b·g, 1, 1]
    W: Tensor  # [b·g, v, v]
    starts: dict[int, Tensor]  # by token: [b·g, 1, 1], True in rows that start a document there
    overflows: bool  # may exp(2x) overflow?
    shape: torch.Size  # b, g, v, k

    def before(self, token: int, state: Tensor) -> Tensor:
        """Return ``state [b·g, v, k]``, zero where a document starts at this token.

        Also of a gradient; NaN and Inf do not pass from one document to the next.
        """
        start = self.starts.get(token)
        return state if start is None else state.masked_fill(start, 0.0)


def _time_major(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views ``[l, b, heads, 1, k]`` twice and ``[l, b, n, v, 1]``, to read or to write."""

    def keys(x: Tensor) -> Tensor:
        return (x if x.dim() == 4 else x[:, :, None]).transpose(0, 1)[..., None, :]

    return keys(q), keys(k), v.transpose(0, 1)[..., None]


def _own(heads: slice, keys: Tensor) -> slice:
    """Return where ``heads`` have their query or key in ``keys [l, b, 1 or n, 1, k]``."""
    return heads if keys.shape[2] > 1 else slice(None)


def _groups(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, initial: Tensor, keep: Tensor | None
) -> Iterator[tuple[slice, _Group]]:
    """Cut the heads into groups of nearly equal size."""
    length, (batch, heads, key_dim, value_dim) = v.shape[1], initial.shape
    head_bytes = batch * key_dim * value_dim * initial.element_size()
    at_once = _STATE_BYTES * torch.get_num_threads()
    count = min(heads, math.ceil(heads * head_bytes / at_once))
    size = math.ceil(heads / count)
    queries, keys, values = _time_major(q, k, v)
    new = None if keep is None else ~keep
    tokens = [] if new is None else new.any(dim=0).nonzero().flatten().tolist()
    overflows = _may_overflow(k, v, W, initial)
    for first in range(0, heads, size):
        own = slice(first, min(first + size, heads))
        shape = torch.Size((batch, own.stop - own.start, value_dim, key_dim))

        def chains(per_row: Tensor, shape: torch.Size = shape) -> Tensor:
            return per_row.view(-1, 1, 1, 1).expand(*shape[:2], 1, 1).reshape(-1, 1, 1)

        yield (
            own,
            _Group(
                queries[:, :, _own(own, queries)],
                keys[:, :, _own(own, keys)],
                values[:, :, own],
                f.transpose(0, 1)[:, :, own].reshape(length, -1, 1, 1),
                W[own].expand(batch, -1, -1, -1).reshape(-1, value_dim, value_dim),
                {t: chains(new[:, t]) for t in tokens} if new is not None else {},
                overflows,
                shape,
            ),
        )


def _may_overflow(k: Tensor, v: Tensor, W: Tensor, initial: Tensor) -> bool:
    """Bound ``2x``, ``x = H W + k vᵀ``, from the inputs: ``|H|`` is at most 1, or what it was."""
    if v.device.type != "cpu":
        return True  # to ask would wait for the device
    state = initial.abs().amax().clamp(min=1.0)
    bound = 2.0 * (k.abs().amax() * v.abs().amax() + state * W.abs().sum(dim=1).amax())
    return not bound.item() < _EXP_LIMIT - 1.0  # NaN: ask nothing of it


def _run_block(group: _Group, block: slice, states: Tensor, candidates: Tensor) -> None:
    """Fill ``states[1:]`` from ``states[0]``, and ``candidates`` with ``Z``.

    ``tanh(x) = e/(e + 2)``, ``e = expm1(2x)``, is accurate relative to the result, as states of a
    new model need, which are far below 1; a form by the sigmoid is accurate only relative to 1. On
    a CPU, it takes about half as long as ``torch.tanh``.
    """
    drive = candidates.view(-1, *group.shape)
    torch.mul(2.0 * group.v[block], group.k[block], out=drive)
    weight = (2.0 * group.W).transpose(1, 2)
    divisor, two = torch.empty_like(candidates[0]), candidates.new_tensor(2.0)
    rows = states.unbind(0)
    per_token = zip(candidates.unbind(0), group.f[block].unbind(0), strict=True)
    for t, (candidate, forget) in enumerate(per_token):
        previous = group.before(block.start + t, rows[t])
        candidate.baddbmm_(weight, previous)
        if group.overflows:
            candidate.clamp_(max=_EXP_LIMIT)
        candidate.expm1_()
        candidate.div_(torch.add(candidate, two, out=divisor))
        torch.lerp(candidate, previous, forget, out=rows[t + 1])


class M2RNNFunction(torch.autograd.Function):
    """``(y, final_state)`` of the recurrence; see :func:`m2rnn_scan` for the arguments.

    All tensors come in the accumulation dtype; ``keep`` is bool ``[b, l]``, False where a document
    starts. Saved for the backward pass: the inputs, and the state before every block of
    ``checkpoint_every`` tokens.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        f: Tensor,
        W: Tensor,
        initial_state: Tensor,
        keep: Tensor | None,
        clip: float | None,
        clip_before_output: bool,
        checkpoint_every: int,
    ) -> tuple[Tensor, Tensor]:
        length, size = v.shape[1], min(checkpoint_every, v.shape[1])
        first = initial_state.transpose(2, 3)  # [b, n, v, k]
        kept = first.new_empty(math.ceil(length / size), *first.shape)
        y, final_state = torch.empty_like(v), torch.empty_like(initial_state)
        for heads, group in _groups(q, k, v, f, W, initial_state, keep):
            chains = group.shape[:2].numel()
            states = first.new_empty(size + 1, chains, *group.shape[2:])
            candidates = torch.empty_like(states[1:])
            states[-1] = first[:, heads].flatten(0, 1)
            for index, start in enumerate(range(0, length, size)):
                block = slice(start, min(start + size, length))
                count = block.stop - block.start
                states[0] = states[-1]
                kept[index, :, heads] = states[0].view(group.shape)
                _run_block(group, block, states[: count + 1], candidates[:count])
                after = states[1 : count + 1].view(-1, *group.shape)
                read = torch.mul(after, group.q[block], out=candidates[:count].view_as(after))
                y[:, block, heads] = read.sum(dim=-1).transpose(0, 1)
            final_state[:, heads] = after[-1].transpose(2, 3)
        ctx.save_for_backward(q, k, v, f, W, keep, kept)
        ctx.options = (clip, clip_before_output, size)  # type: ignore[attr-defined]
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, f, W, keep, kept = ctx.saved_tensors  # type: ignore[attr-defined]
        clip, before, size = ctx.options  # type: ignore[attr-defined]
        length = v.shape[1]
        # Heads add to the gradients of a query and key that they share.
        grad_q, grad_k = torch.zeros_like(q), torch.zeros_like(k)
        grad_v, grad_f, grad_W = (torch.empty_like(x) for x in (v, f, W))
        grad_initial = torch.empty_like(grad_final)
        queries, keys, values = _time_major(grad_q, grad_k, grad_v)
        for heads, group in _groups(q, k, v, f, W, kept[0].transpose(2, 3), keep):
            grads = _Gradients(
                queries[:, :, _own(heads, queries)],
                keys[:, :, _own(heads, keys)],
                values[:, :, heads],
                grad_f.transpose(0, 1)[:, :, heads],
                torch.zeros_like(group.W),
            )
            carry = grad_final[:, heads].transpose(2, 3).flatten(0, 1).contiguous()
            scratch = kept.new_empty(4, size + 1, *carry.shape)
            for start in reversed(range(0, length, size)):
                block = slice(start, min(start + size, length))
                here = scratch[:, : block.stop - start + 1]
                here[0, 0] = kept[start // size][:, heads].flatten(0, 1)
                outputs = grad_y[:, block, heads].transpose(0, 1)
                carry = _block_backward(group, grads, block, here, outputs, carry, (clip, before))
            grad_W[heads] = grads.W.view(-1, *W[heads].shape).sum(dim=0)
            grad_initial[:, heads] = carry.view(group.shape).transpose(2, 3)
        return grad_q, grad_k, grad_v, grad_f, grad_W, grad_initial, None, None, None, None


class _Gradients(NamedTuple):
    """Where the gradients of a group go."""

    q: Tensor  # as in _Group
    k: Tensor
    v: Tensor
    f: Tensor  # [l, b, g]
    W: Tensor  # [b·g, v, v]


def _block_backward(
    group: _Group,
    grads: _Gradients,
    block: slice,
    scratch: Tensor,
    grad_y: Tensor,
    carry: Tensor,
    clipping: tuple[float | None, bool],
) -> Tensor:
    """Write or add the block's gradients, return the gradient of the state before the block.

    Args:
        scratch: ``[4, t + 1, b·g, v, k]``; the first of all is the state before the block.
        grad_y: ``[t, b, g, v]``.
        carry: ``[b·g, v, k]``, the gradient of the state after the block; overwritten.
    """
    clip, clip_before_output = clipping
    states = scratch[0]
    candidates, totals, grad_pre = scratch[1:, 1:].unbind(0)
    _run_block(group, block, states, candidates)
    grads.q[block] += _over_values(grad_y, states[1:], grads.q)
    for t in range(len(candidates)):
        states[t] = group.before(block.start + t, states[t])
    torch.mul(grad_y[..., None], group.q[block], out=totals.view(-1, *group.shape))

    forgets, keeps = group.f[block].unbind(0), (1.0 - group.f[block]).unbind(0)
    rows = list(zip(totals.unbind(0), candidates.unbind(0), grad_pre.unbind(0), strict=True))
    for t, (total, candidate, pre) in reversed(list(enumerate(rows))):
        # dL/dH_t: what y_t sends back, and what later tokens do, clipped as asked
        if clip is not None and clip_before_output:
            carry.clamp_(-clip, clip)
        total.add_(carry)
        if clip is not None and not clip_before_output:
            total.clamp_(-clip, clip)
        torch.mul(total, keeps[t], out=carry)
        torch.ops.aten.tanh_backward.grad_input(carry, candidate, grad_input=pre)
        torch.mul(total, forgets[t], out=carry).baddbmm_(group.W, pre)
        carry = group.before(block.start + t, carry)

    before = states[:-1]
    grads.W.add_((before @ grad_pre.transpose(-1, -2)).sum(dim=0))
    sent = torch.sub(before, candidates, out=candidates).mul_(totals)
    grads.f[block] = sent.view(-1, *group.shape).sum(dim=(3, 4))
    sent = torch.mul(
        grad_pre.view(-1, *group.shape), group.k[block], out=totals.view(-1, *group.shape)
    )
    grads.v[block] = sent.sum(dim=-1, keepdim=True)
    grads.k[block] += _over_values(group.v[block].squeeze(-1), grad_pre, grads.k)
    return carry


def _over_values(values: Tensor, states: Tensor, like: Tensor) -> Tensor:
    """Sum ``values [t, b, g, v] · states [t, b·g, v, k]`` over v, and over heads where ``like
    [l, b, 1 or g, 1, k]`` has one."""
    count, axes = len(values), like.shape[1:]
    matrices = count * axes[0] * axes[1]
    product = torch.bmm(
        values.reshape(matrices, 1, -1), states.reshape(matrices, -1, states.shape[-1])
    )
    return product.view(count, *axes)
