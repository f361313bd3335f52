"""Mamba-3's recurrent state, its decay activation, and the checks that every form of it makes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixer_settings import AActivation, Mamba3Dimensions
from nemo_megacpp.mixers.kernels.packing import accumulation_dtype, check_groups, check_shapes
from nemo_megacpp.mixers.kernels.rotary import check_pairs


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
    shapes = {
        "x": (x, "b l h p"),
        "B": (B, "b l r g n"),
        "C": (C, "b l r g n"),
        "B_bias": (B_bias, "h r n"),
        "C_bias": (C_bias, "h r n"),
        "dt": (dt, "b l h"),
        "A": (A, "b l h"),
        "lam": (lam, "b l h"),
        "angle_rate": (angle_rate, "b l s"),
        "D": (D, "h"),
        "mimo_x": (mimo_x, "h r p"),
    }
    sizes = check_shapes(shapes)
    check_groups(sizes["h"], sizes["g"])
    check_pairs(pairs, sizes["n"], sizes["s"])
    if mimo_x is None and sizes["r"] != 1:
        raise UserError(f"mimo_x [h, r, p] must be given when B has rank r={sizes['r']} > 1.")
    if state is not None:
        axes = zip(state._fields, state, ("b h p n", "b h r n", "b h p", "b h s"), strict=True)
        check_shapes({f"initial_state.{name}": (part, of) for name, part, of in axes}, **sizes)


def starting_state(x: Tensor, B: Tensor, num_angles: int, state: Mamba3State | None) -> Mamba3State:
    """Return the initial state in the accumulation dtype, zero if none is given."""
    acc = accumulation_dtype(x)
    if state is not None:
        return Mamba3State(*(part.to(acc) for part in state))
    batch, _, heads, head_dim = x.shape
    rank, _, state_dim = B.shape[2:]
    shapes = ((head_dim, state_dim), (rank, state_dim), (head_dim,), (num_angles,))
    return Mamba3State(*(x.new_zeros(batch, heads, *shape, dtype=acc) for shape in shapes))


def mamba3_state_shapes(dims: Mamba3Dimensions, heads: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the parts of a :class:`Mamba3State` of one sequence and ``heads``
    heads."""
    p, n = dims.head_dim, dims.state_dim
    return (heads, p, n), (heads, dims.mimo_rank, n), (heads, p), (heads, dims.num_angles)
