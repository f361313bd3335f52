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
    """See :func:`rotate_with_bias`. Saved are the results, which the scan saves as well."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, angle: Tensor
    ) -> tuple[Tensor, Tensor]:
        cos, sin = (y[..., None, :] for y in (angle.cos(), angle.sin()))
        groups = B.shape[3]
        keys, queries = (
            (x[..., None, :, :] + bias.unflatten(0, (groups, -1))).flatten(3, 4)
            for x, bias in ((B, B_bias), (C, C_bias))
        )
        for x in (keys, queries):
            _turn(*_pairs(x, cos), cos, sin)
        ctx.save_for_backward(keys, queries, cos, sin)
        ctx.groups = groups  # type: ignore[attr-defined]
        return keys, queries

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
        *turned, cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_angle = torch.zeros_like(cos[..., 0, :])
        projected, biases = [], []
        for x, grad in zip(turned, grads, strict=True):
            (a, b), (grad_a, grad_b) = _pairs(x, cos), _pairs(grad, cos)
            grad_angle += (grad_b * a).sub_(grad_a * b).sum(dim=-2)
            back = grad.clone(memory_format=torch.contiguous_format)
            _turn(*_pairs(back, cos), cos, -sin)
            by_group = back.unflatten(3, (ctx.groups, -1))  # type: ignore[attr-defined]
            projected.append(by_group.sum(dim=4))
            biases.append(back.sum(dim=(0, 1, 2)))
        return *projected, *biases, grad_angle


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
