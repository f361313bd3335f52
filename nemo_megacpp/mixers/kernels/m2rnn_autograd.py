"""The M²RNN recurrence with a hand-written backward, few operations a token.

Inside, a state is kept as ``[n, v, b, k]``: the small product with W becomes ``n`` products
``[v, v] @ [v, b·k]`` with a long inner axis, and every elementwise operation runs over contiguous
memory. Work that does not depend on the previous token is done for a block of tokens at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# What one array over a block may take: few enough bytes to stay in cache.
_BLOCK_BYTES = 2**20
# exp() of more overflows float32; tanh is -1 to its last digit long before.
_EXP_LIMIT = 80.0


class _TimeMajor(NamedTuple):
    """Per-token tensors that broadcast against states ``[l, n, v, b, k]``."""

    q: Tensor  # [l, 1 or n, 1, b, k]
    k: Tensor  # [l, 1 or n, 1, b, k]
    v: Tensor  # [l, n, v, b, 1]
    f: Tensor  # [l, n, 1, b, 1]


class _Resets(NamedTuple):
    """Where packed documents start."""

    keep: Tensor  # [l, 1, 1, b, 1], zero where a document starts
    any_row: list[bool]  # does any row start a document at this token?


class _Inputs(NamedTuple):
    tokens: _TimeMajor
    W: Tensor  # [n, v, v]
    resets: _Resets | None


def _time_major(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> _TimeMajor:
    """Return views, so that gradients can be written through them as well."""

    def keys(x: Tensor) -> Tensor:
        per_head = x if x.dim() == 4 else x[:, :, None]
        return per_head.permute(1, 2, 0, 3)[:, :, None]

    return _TimeMajor(
        keys(q), keys(k), v.permute(1, 2, 3, 0)[..., None], f.permute(1, 2, 0)[:, :, None, :, None]
    )


def _prepare(q: Tensor, k: Tensor, v: Tensor, f: Tensor, W: Tensor, keep: Tensor | None) -> _Inputs:
    tokens = _TimeMajor(*(x.contiguous() for x in _time_major(q, k, v, f)))
    if keep is None:
        return _Inputs(tokens, W, None)
    rows = keep.to(v.dtype).t()[:, None, None, :, None]
    return _Inputs(tokens, W, _Resets(rows, (~keep).any(dim=0).tolist()))


def _block_length(state: Tensor) -> int:
    """Tokens worked on at once: 8 to 64, measured on a CPU."""
    return max(8, min(64, _BLOCK_BYTES // (state.numel() * state.element_size())))


def _keep_at(inputs: _Inputs, t: int, state: Tensor, shape: torch.Size) -> Tensor:
    """Zero the rows of ``state [n, v, b·k]`` whose document starts at token ``t``."""
    if inputs.resets is None or not inputs.resets.any_row[t]:
        return state
    return (state.view(shape) * inputs.resets.keep[t]).flatten(2)


def _tanh_of_halves(twice: Tensor) -> Tensor:
    """Return ``tanh(x) = -e/(e + 2)``, ``e = expm1(-2x)``, and overwrite ``twice = -2x``.

    Accurate relative to the result, as states of a new model need, which are far below 1; a form by
    the sigmoid is accurate to 2e-7 only relative to 1. On a CPU, half as long as ``torch.tanh``.
    """
    e = twice.clamp_(max=_EXP_LIMIT).expm1_()
    return e.neg().div_(e.add_(2.0))


def _drive(inputs: _Inputs, block: slice, out: Tensor) -> Tensor:
    """Write ``-2·k_t v_tᵀ`` for a block of tokens into ``out [t, n, v, b, k]``."""
    return torch.mul(inputs.tokens.v[block] * -2.0, inputs.tokens.k[block], out=out)


def _run_block(inputs: _Inputs, block: slice, states: Tensor) -> None:
    """Fill ``states[1:]`` from ``states[0]``; ``states`` is ``[t + 1, n, v, b, k]``."""
    shape = states.shape[1:]
    weight = (inputs.W * -2.0).transpose(1, 2)
    forgets = inputs.tokens.f[block].expand(-1, *shape).contiguous().flatten(3).unbind(0)
    drives = _drive(inputs, block, torch.empty_like(states[1:])).flatten(3).unbind(0)
    rows = states.flatten(3).unbind(0)
    for t, (drive, forget) in enumerate(zip(drives, forgets, strict=True)):
        previous = _keep_at(inputs, block.start + t, rows[t], shape)
        candidate = _tanh_of_halves(drive.baddbmm_(weight, previous))
        torch.lerp(candidate, previous, forget, out=rows[t + 1])


class M2RNNFunction(torch.autograd.Function):
    """``(y, final_state)`` of the recurrence; see :func:`m2rnn_scan` for the arguments.

    All tensors come in the accumulation dtype; ``keep`` is bool ``[b, l]``, False where a document
    starts. Saved for the backward pass: the inputs, and the state after every token or, with
    ``checkpoint_every``, before every block of so many tokens.
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
        checkpoint_every: int | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = _prepare(q, k, v, f, W, keep)
        length = v.shape[1]
        first = initial_state.permute(1, 3, 0, 2)
        size = min(checkpoint_every or _block_length(first), length)
        starts = range(0, length, size)
        kept = first.new_empty(len(starts) if checkpoint_every else length + 1, *first.shape)
        kept[0] = first
        scratch = first.new_empty(size + 1, *first.shape) if checkpoint_every else None
        outputs = []
        for index, start in enumerate(starts):
            stop = min(start + size, length)
            if scratch is None:
                states = kept[start : stop + 1]
            else:
                states = scratch[: stop - start + 1]
                states[0] = kept[index] if index == 0 else scratch[size]
                kept[index] = states[0]
            _run_block(inputs, slice(start, stop), states)
            outputs.append((states[1:] * inputs.tokens.q[start:stop]).sum(dim=-1))
        y = torch.cat(outputs).permute(3, 0, 1, 2).contiguous()
        final_state = states[-1].permute(2, 0, 3, 1).contiguous()
        ctx.save_for_backward(q, k, v, f, W, keep, kept)
        ctx.options = (clip, clip_before_output, checkpoint_every, size)  # type: ignore[attr-defined]
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, f, W, keep, kept = ctx.saved_tensors  # type: ignore[attr-defined]
        clip, before, checkpoint_every, size = ctx.options  # type: ignore[attr-defined]
        inputs = _prepare(q, k, v, f, W, keep)
        length = v.shape[1]
        grad_outputs = grad_y.permute(1, 2, 3, 0)[..., None].contiguous()
        grad_q, grad_k, grad_v, grad_f = (torch.empty_like(x) for x in (q, k, v, f))
        grads = _time_major(grad_q, grad_k, grad_v, grad_f)
        grad_W = torch.zeros_like(W)
        carry = grad_final.permute(1, 3, 0, 2).contiguous().flatten(2)
        # Allocated once: blocks are large enough for the allocator to ask the system for each.
        scratch = kept.new_empty(5, size, *kept.shape[1:])
        for start in reversed(range(0, length, size)):
            block = slice(start, min(start + size, length))
            if checkpoint_every:
                states = kept.new_empty(block.stop - start + 1, *kept.shape[1:])
                states[0] = kept[start // size]
                _run_block(inputs, block, states)
            else:
                states = kept[start : block.stop + 1]
            carry = _block_backward(
                inputs,
                grads,
                grad_W,
                block,
                states,
                grad_outputs[block],
                carry,
                (clip, before),
                scratch[:, : block.stop - start],
            )
        batch, key_dim = v.shape[0], q.shape[-1]
        grad_initial = carry.unflatten(2, (batch, key_dim)).permute(2, 0, 3, 1)
        return grad_q, grad_k, grad_v, grad_f, grad_W, grad_initial, None, None, None, None


def _block_backward(
    inputs: _Inputs,
    grads: _TimeMajor,
    grad_W: Tensor,
    block: slice,
    states: Tensor,
    grad_y: Tensor,
    carry: Tensor,
    clipping: tuple[float | None, bool],
    scratch: Tensor,
) -> Tensor:
    """Write the block's gradients into ``grads``, add to ``grad_W``, return the carried one."""
    tokens, shape = inputs.tokens, states.shape[1:]
    clip, clip_before_output = clipping
    half, totals, forget, slope, grad_pre = scratch.unbind(0)
    previous, after = states[:-1], states[1:]
    if inputs.resets is not None and any(inputs.resets.any_row[block]):
        previous = previous * inputs.resets.keep[block]
    forget.copy_(tokens.f[block].expand_as(forget))
    weight = (inputs.W * -2.0).transpose(1, 2)
    candidate = _tanh_of_halves(
        _drive(inputs, block, half).add_((weight @ previous.flatten(3)).view_as(half))
    )
    # dH_t/dpre_t = (1 - f)(1 - Z²), for all tokens at once.
    one = candidate.new_ones(())
    torch.addcmul(one, candidate, candidate, value=-1.0, out=slope).mul_(1.0 - tokens.f[block])
    torch.mul(grad_y, tokens.q[block], out=totals)  # becomes dL/dH_t, clipped as asked

    total_rows, forget_rows = totals.flatten(3).unbind(0), forget.flatten(3).unbind(0)
    slope_rows, grad_pre_rows = slope.flatten(3).unbind(0), grad_pre.flatten(3).unbind(0)
    for t in reversed(range(len(total_rows))):
        total = total_rows[t]
        if clip is None:
            total.add_(carry)
        elif clip_before_output:
            total.add_(carry.clamp(-clip, clip))
        else:
            total.add_(carry).clamp_(-clip, clip)
        torch.mul(slope_rows[t], total, out=grad_pre_rows[t])
        carry = torch.mul(forget_rows[t], total).baddbmm_(inputs.W, grad_pre_rows[t])
        carry = _keep_at(inputs, block.start + t, carry, shape)

    grad_W += (previous.flatten(3) @ grad_pre.flatten(3).transpose(-1, -2)).sum(dim=0)
    product = torch.sub(previous, candidate, out=slope).mul_(totals)
    grads.f[block] = product.sum(dim=(2, 4), keepdim=True)
    product = torch.mul(grad_pre, tokens.k[block], out=slope)
    grads.v[block] = product.sum(dim=4, keepdim=True)
    product = grad_pre.mul_(tokens.v[block])
    grads.k[block] = product.sum(dim=_summed_axes(tokens.k, tokens.v), keepdim=True)
    product = torch.mul(after, grad_y, out=slope)
    grads.q[block] = product.sum(dim=_summed_axes(tokens.q, tokens.v), keepdim=True)
    return carry


def _summed_axes(keys: Tensor, values: Tensor) -> tuple[int, ...]:
    """Axes of ``[t, n, v, b, k]`` that a query or key is shared over: values, and heads if one."""
    return (2,) if keys.shape[1] == values.shape[1] else (1, 2)
