"""Mamba-3's recurrent state, its decay activation, and the checks that every form of it makes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.kernels.packing import accumulation_dtype, check_shape
from nemo_megacpp.mixers.kernels.rotary import check_pairs

AActivation = Literal["softplus", "heavy_tail"]


class Mamba3State(NamedTuple):
    """What one token hands to the next, in the accumulation dtype; zero before a document.

    Attributes:
        ssm: ``[b, h, p, n]``, S.
        k: ``[b, h, r, n]``, the rotated keys of the last token.
        v: ``[b, h, p]``, the input x of the last token (before ``mimo_x``).
        angle: ``[b, h, s]``, θ in [0, 2π).
    """

    ssm: Tensor
    k: Tensor
    v: Tensor
    angle: Tensor


def negative_decay_rate(
    dd_A: Tensor, A_floor: float = 1e-4, activation: AActivation = "softplus"
) -> Tensor:
    """Return ``A = min(-a(dd_A), -A_floor)``, computed in at least float32.

    ``a`` is softplus in mamba_ssm 2.3.2.post1, and on its main branch ``'heavy_tail'``: ``1 + x``
    for ``x >= 0`` and ``1 / (1 - x)`` below.

    Raises:
        UserError: the activation is unknown.
    """
    x = dd_A.to(accumulation_dtype(dd_A))
    if activation == "softplus":
        rate = F.softplus(x)
    elif activation == "heavy_tail":
        rate = torch.where(x >= 0, 1 + x, 1 / (1 - x.clamp(max=0)))
    else:
        raise UserError(f"activation must be 'softplus' or 'heavy_tail', got {activation!r}.")
    return (-rate).clamp(max=-A_floor)


def check_inputs(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    dt: Tensor,
    A: Tensor,
    lam: Tensor,
    angle_rate: Tensor,
    D: Tensor,
    mimo_x: Tensor | None,
    pairs: str,
    state: Mamba3State | None,
) -> None:
    """Raise :class:`UserError` for the first argument of the scan that does not fit."""
    if x.dim() != 4:
        raise UserError(f"x must have shape [b, l, h, p], got {list(x.shape)}.")
    batch, length, heads, head_dim = x.shape
    if length == 0:
        raise UserError("the sequence must hold at least one token, got l=0.")
    if B.dim() != 5:
        raise UserError(f"B must have shape [b, l, r, g, n], got {list(B.shape)}.")
    rank, groups, state_dim = B.shape[2:]
    if groups == 0 or heads % groups:
        raise UserError(f"the number of heads ({heads}) must be a multiple of groups ({groups}).")
    check_shape("B", B, (batch, length, rank, groups, state_dim), "[b, l, r, g, n]")
    check_shape("C", C, (batch, length, rank, groups, state_dim), "[b, l, r, g, n]")
    for name, bias in (("B_bias", B_bias), ("C_bias", C_bias)):
        check_shape(name, bias, (heads, rank, state_dim), "[h, r, n]")
    for name, tensor in (("dt", dt), ("A", A), ("lam", lam)):
        check_shape(name, tensor, (batch, length, heads), "[b, l, h]")
    num_angles = angle_rate.shape[-1]
    check_shape("angle_rate", angle_rate, (batch, length, num_angles), "[b, l, s]")
    check_pairs(pairs, state_dim, num_angles)
    check_shape("D", D, (heads,), "[h]")
    if mimo_x is not None:
        check_shape("mimo_x", mimo_x, (heads, rank, head_dim), "[h, r, p]")
    elif rank != 1:
        raise UserError(f"mimo_x [h, r, p] must be given when B has rank r={rank} > 1.")
    if state is not None:
        per_head = (batch, heads)
        check_shape(
            "initial_state.ssm", state.ssm, (*per_head, head_dim, state_dim), "[b, h, p, n]"
        )
        check_shape("initial_state.k", state.k, (*per_head, rank, state_dim), "[b, h, r, n]")
        check_shape("initial_state.v", state.v, (*per_head, head_dim), "[b, h, p]")
        check_shape("initial_state.angle", state.angle, (*per_head, num_angles), "[b, h, s]")


def starting_state(x: Tensor, B: Tensor, num_angles: int, state: Mamba3State | None) -> Mamba3State:
    """Return the initial state in the accumulation dtype, zero if none is given."""
    acc = accumulation_dtype(x)
    if state is not None:
        return Mamba3State(*(part.to(acc) for part in state))
    batch, _, heads, head_dim = x.shape
    rank, _, state_dim = B.shape[2:]
    return Mamba3State(
        x.new_zeros(batch, heads, head_dim, state_dim, dtype=acc),
        x.new_zeros(batch, heads, rank, state_dim, dtype=acc),
        x.new_zeros(batch, heads, head_dim, dtype=acc),
        x.new_zeros(batch, heads, num_angles, dtype=acc),
    )
