"""Data-dependent rotary embedding of Mamba-3: accumulated angles, and rotations by pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def accumulated_angles(
    rate: Tensor, dt: Tensor, initial: Tensor | None, ids: Tensor | None
) -> Tensor:
    """Sum the angle steps ``rate_t·dt_t`` of each document, modulo 2π.

    Summed in float64: after thousands of tokens the sum is far larger than 2π, and float32 would
    keep only a few digits of the angle.

    Args:
        rate: ``[b, l, s]``, rad per unit of time, shared by all heads.
        dt: ``[b, l, h]``.
        initial: ``[b, h, s]``, the angle before the row, where the first document continues.
        ids: document numbers ``[b, l]``, or None where a row is one document.

    Returns:
        ``[b, l, h, s]`` in the dtype of ``dt``.
    """
    steps = rate.double()[:, :, None] * dt.double()[..., None]
    angle = steps.cumsum(dim=1)
    if ids is not None:
        # What had been summed before the document's first token.
        token = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        is_start = torch.ones_like(ids, dtype=torch.bool)
        is_start[:, 1:] = ids[:, 1:] != ids[:, :-1]
        start = torch.where(is_start, token, 0).cummax(dim=1).values
        index = start[..., None, None].expand_as(angle)
        angle = angle - (angle - steps).gather(1, index)
    if initial is not None:
        offset = initial.double()[:, None]
        angle = angle + (offset if ids is None else offset * (ids == 0)[..., None, None])
    return angle.remainder(TWO_PI).to(dt.dtype)
