"""Mamba-2's state space duality (SSD) scan, by chunks.

Same meaning as ``mamba_chunk_scan_combined`` of mamba_ssm (Dao and Gu, arXiv 2405.21060).
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.kernels.chunk_scan import chunk_scan
from nemo_megacpp.mixers.kernels.chunks import cut_into_chunks, from_chunks, to_chunks
from nemo_megacpp.mixers.kernels.packing import (
    accumulation_dtype,
    check_groups,
    check_shapes,
)

Output: TypeAlias = Tensor | tuple[Tensor, Tensor]


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
) -> None:
    sizes = check_shapes(
        {
            "x": (x, "b l h p"),
            "dt": (dt, "b l h"),
            "A": (A, "h"),
            "B": (B, "b l g n"),
            "C": (C, "b l g n"),
            "D": (D, "h p" if D is not None and D.dim() == 2 else "h"),
            "z": (z, "b l h p"),
            "dt_bias": (dt_bias, "h"),
            "initial_states": (initial_states, "b h p n"),
        }
    )
    check_groups(sizes["h"], sizes["g"])


def step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, acc: torch.dtype) -> Tensor:
    # Contiguous, as softplus rounds strided memory differently: a slice of heads would differ.
    dt = dt.to(acc).contiguous()
    if dt_bias is not None:
        dt = dt + dt_bias.to(acc)
    return F.softplus(dt) if dt_softplus else dt


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + x * (D.to(y.dtype) if D.dim() == 2 else D.to(y.dtype)[:, None])
    return y if z is None else y * F.silu(z.to(y.dtype))


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Output:
    """Scan ``H_t = exp(dt_t·A)·H_{t-1} + dt_t·x_t B_tᵀ`` and read ``y_t = H_t C_t + D·x_t``.

    Matrix products inside chunks, a short loop over chunk states between them. No sum crosses
    heads, so a rank that holds a slice of heads and groups computes the same numbers.

    Args:
        x: ``[b, l, h, p]``; float64 accumulates in float64, every other dtype in float32.
        dt: ``[b, l, h]``, the step size (before ``dt_bias`` and softplus, if those are given).
        A: ``[h]``, negative.
        B: ``[b, l, g, n]``; so is C.
        C: of the group; the heads fall in ``g`` consecutive blocks, one for each group.
        chunk_size: tokens in a chunk, at most; see :func:`cut_into_chunks`.
        D: ``[h]`` or ``[h, p]``, the skip weight.
        z: ``[b, l, h, p]``, the gate: the output is ``y · silu(z)``.
        dt_bias: ``[h]``, added to ``dt``.
        dt_softplus: apply softplus to ``dt + dt_bias``.
        initial_states: ``[b, h, p, n]``; belongs to the first document of each row.
        seq_idx: integer ``[b, l]``; the state is zero again wherever the value changes.
        return_final_states: also return the state after the last token.

    Returns:
        ``y [b, l, h, p]`` in the dtype of ``x``; with ``return_final_states`` also the final state
        ``[b, h, p, n]`` in the accumulation dtype.

    Raises:
        UserError: a shape does not fit.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states)
    if chunk_size < 1:
        raise UserError(f"chunk_size must be at least 1, got {chunk_size}.")
    acc = accumulation_dtype(x)
    batch, length, _, _ = x.shape
    chunks = cut_into_chunks(batch, length, chunk_size, seq_idx)
    step = to_chunks(step_size(dt, dt_bias, dt_softplus, acc), chunks)
    y, final = chunk_scan(
        to_chunks(x.to(acc), chunks).unsqueeze(4),
        to_chunks(B.to(acc), chunks).unsqueeze(4),
        to_chunks(C.to(acc), chunks).unsqueeze(4),
        step * A.to(acc),
        step,
        D=None if D is None else D.to(acc),
        initial=initial_states,
        starts=chunks.starts,
        final=return_final_states,
    )
    y = from_chunks(y.squeeze(4), chunks)
    if z is not None:
        y = y * F.silu(z.to(acc))
    y = y.to(x.dtype)
    return y if final is None else (y, final)
