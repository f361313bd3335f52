"""Mamba-2's state space duality (SSD) scan: a reference loop and the chunked form that trains.

Same meaning as ``mamba_chunk_scan_combined`` of mamba_ssm (Dao and Gu, arXiv 2405.21060).
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.kernels.chunk_states import chunk_decays, pass_states, to_chunks
from nemo_megacpp.mixers.kernels.packing import (
    accumulation_dtype,
    check_groups,
    check_shapes,
    chunked_ids,
    document_ids,
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
        chunk_size: tokens in a chunk; 32 to 64 is fastest on a CPU.
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
    batch, length, heads, _ = x.shape
    groups = B.shape[2]
    per_group = heads // groups
    size = min(chunk_size, length)
    ids = None
    if seq_idx is not None:
        ids = chunked_ids(document_ids(seq_idx, batch, length), size)
    step = step_size(dt, dt_bias, dt_softplus, acc)
    x_acc = x.to(acc)
    # Padding has dt = 0: no decay and no input.
    decays = chunk_decays(to_chunks(step * A.to(acc), size).transpose(2, 3), ids)
    inputs = to_chunks(x_acc * step[..., None], size).transpose(2, 3)  # [b, c, h, q, p]
    keys = to_chunks(B.to(acc), size).transpose(2, 3)  # [b, c, g, q, n]
    queries = to_chunks(C.to(acc), size).transpose(2, 3)

    scores = queries @ keys.transpose(-1, -2)  # [b, c, g, q, q]
    scores = (decays.inner.unflatten(2, (groups, per_group)) * scores[:, :, :, None]).flatten(2, 3)
    y = scores @ inputs

    weighted = (inputs * decays.outgoing[..., None]).unflatten(2, (groups, per_group))
    added = weighted.transpose(-1, -2) @ keys[:, :, :, None]  # [b, c, g, h/g, p, n]
    before, final = pass_states(added.flatten(2, 3), decays.total, initial_states)

    read = queries[:, :, :, None] @ before.unflatten(2, (groups, per_group)).transpose(-1, -2)
    y = torch.addcmul(y, read.flatten(2, 3), decays.incoming[..., None])
    y = y.transpose(2, 3).flatten(1, 2)[:, :length]
    y = skip_and_gate(y, x_acc, D, z).to(x.dtype)
    return (y, final) if return_final_states else y
