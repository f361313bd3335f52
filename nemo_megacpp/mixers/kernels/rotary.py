"""Data-dependent rotary embedding of Mamba-3: accumulated angles, and rotations by pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixer_settings import Pairs

PAIRS = ("interleaved", "halves")
TWO_PI = 2 * math.pi

# What the part of one array that is worked on at a time may take.
_BLOCK_BYTES = 2**19


def check_pairs(pairs: str, state_dim: int, num_angles: int) -> None:
    """Raise :class:`UserError` unless ``num_angles`` pairs of this kind fit into ``state_dim``."""
    if pairs not in PAIRS:
        raise UserError(f"pairs must be one of {list(PAIRS)}, got {pairs!r}.")
    if state_dim % 2 or num_angles > state_dim // 2:
        raise UserError(
            f"the state dim must be even and hold a pair for every angle, "
            f"got n={state_dim} and s={num_angles} (at most {state_dim // 2})."
        )


def to_halves(x: Tensor, pairs: Pairs) -> Tensor:
    """Reorder the last axis so that the pairs of ``x`` are those of ``'halves'``."""
    return x if pairs == "halves" else x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def from_halves(x: Tensor, pairs: Pairs) -> Tensor:
    """Undo :func:`to_halves`."""
    return x if pairs == "halves" else x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def accumulated_angles(rate: Tensor, dt: Tensor, initial: Tensor, starts: Tensor | None) -> Tensor:
    """Sum the angle steps ``rate_t·dt_t`` of each document, modulo 2π.

    Summed in float64: after thousands of tokens the sum is far larger than 2π, and float32 would
    keep only a few digits of the angle.

    Args:
        rate: ``[b, c, q, s]``, rad per unit of time, shared by all heads; in chunks.
        dt: ``[b, c, q, h]``.
        initial: ``[b, h, s]``, the angle before the row, where the first document continues.
        starts: bool ``[b, c]``, the chunks that begin another document; None for none.

    Returns:
        ``[b, c, q, h, s]`` in the dtype of ``dt``.
    """
    steps = rate.double()[:, :, :, None] * dt.double()[..., None]
    angle = steps.cumsum(dim=2)
    after = angle[:, :, -1]
    if starts is None:
        before = torch.cat([initial.double()[:, None], after[:, :-1]], dim=1).cumsum(dim=1)
    else:
        # Chunk by chunk: a difference of sums over the row would carry a NaN to later documents.
        carried = [initial.double()]
        for c in range(1, after.shape[1]):
            carried.append((carried[-1] + after[:, c - 1]).masked_fill(starts[:, c, None, None], 0))
        before = torch.stack(carried, dim=1)
    return (angle + before[:, :, None]).remainder(TWO_PI).to(dt.dtype)


class _RotateWithBias(torch.autograd.Function):
    """See :func:`rotate_with_bias`. Saved are the results, which the scan saves as well.

    Worked off a few chunks at a time, which stay in cache; the cost of a token does not grow with
    the length. No sum runs over chunks before the last line.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, angle: Tensor
    ) -> tuple[Tensor, Tensor]:
        cos, sin = (y[..., None, :] for y in (angle.cos(), angle.sin()))
        groups = B.shape[3]
        heads = B_bias.shape[0]
        turned = []
        for x, bias in ((B, B_bias), (C, C_bias)):
            by_group = bias.unflatten(0, (groups, -1))
            out = x.new_empty(*x.shape[:3], heads, *x.shape[4:])
            for block in _blocks(out):
                to = out[:, block]
                torch.add(x[:, block, :, :, None], by_group, out=to.unflatten(3, (groups, -1)))
                part_cos, part_sin = cos[:, block], sin[:, block]
                _turn(*_pairs(to, part_cos), part_cos, part_sin)
            turned.append(out)
        ctx.save_for_backward(*turned, cos, sin)
        ctx.groups = groups  # type: ignore[attr-defined]
        return turned[0], turned[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
        *turned, cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        groups: int = ctx.groups  # type: ignore[attr-defined]
        grad_angle = torch.zeros_like(cos[..., 0, :])
        projected, biases = [], []
        for x, grad in zip(turned, grads, strict=True):
            of_group = x.new_empty(*x.shape[:3], groups, *x.shape[4:])
            of_bias = x.new_empty(*x.shape[:2], *x.shape[3:])
            for block in _blocks(x):
                part_cos, part_sin = cos[:, block], sin[:, block]
                (a, b), (grad_a, grad_b) = (_pairs(y[:, block], part_cos) for y in (x, grad))
                grad_angle[:, block] += (grad_b * a).sub_(grad_a * b).sum(dim=-2)
                back = grad[:, block].clone(memory_format=torch.contiguous_format)
                _turn(*_pairs(back, part_cos), part_cos, -part_sin)
                torch.sum(back.unflatten(3, (groups, -1)), dim=4, out=of_group[:, block])
                torch.sum(back, dim=2, out=of_bias[:, block])
            projected.append(of_group)
            biases.append(of_bias.sum(dim=(0, 1)))
        return *projected, *biases, grad_angle


def _blocks(x: Tensor) -> list[slice]:
    count = x.shape[1]
    step = max(1, _BLOCK_BYTES * count // (x.numel() * x.element_size()))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _pairs(x: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    """The channels of ``x [..., n]`` that turn, as two views ``[..., s]``."""
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)
    return first[..., : cos.shape[-1]], second[..., : cos.shape[-1]]


def _turn(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the pairs ``(a, b)`` in place."""
    crossed = a * sin
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(crossed)


def rotate_with_bias(
    B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, angle: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the biases of each head and rotate: keys and queries ``[b, c, q, h, r, n]``.

    Products of queries and keys do not depend on the order of the state axis, so all of it is in
    ``'halves'`` order, whose rotation touches contiguous memory.

    Args:
        B: ``[b, c, q, g, r, n]``; so is C.
        B_bias: ``[h, r, n]``; so is C_bias.
        angle: ``[b, c, q, h, s]``.
    """
    keys, queries = _RotateWithBias.apply(B, C, B_bias, C_bias, angle)
    return keys, queries
