"""Mamba-3's scan, single- and multi-input: a reference loop and the chunked form that trains.

Per head, with rank r (1 = SISO), the equations of ``mamba_ssm/modules/mamba3.py``::

    α_t = exp(A_t Δ_t);  γ_t = λ_t Δ_t;  β_t = (1 - λ_t) Δ_t α_t
    θ_t = θ_{t-1} + rate_t Δ_t  (mod 2π);  v_{t,r} = x_t ⊙ mimo_x_r
    k_{t,r} = Rot_θ(B_{t,r} + B_bias_r);  q_{t,r} = Rot_θ(C_{t,r} + C_bias_r)
    S_t = α_t S_{t-1} + β_t Σ_r v_{t-1,r} k_{t-1,r}ᵀ + γ_t Σ_r v_{t,r} k_{t,r}ᵀ
    o_{t,r} = S_t q_{t,r} + D v_{t,r}

Projections, norms, the gate and the down-projection over r belong to the mixer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixer_settings import Pairs
from nemo_megacpp.mixers.kernels.chunk_states import chunk_decays, pass_states, to_chunks
from nemo_megacpp.mixers.kernels.mamba3_state import Mamba3State, check_inputs, starting_state
from nemo_megacpp.mixers.kernels.packing import accumulation_dtype, chunked_ids, document_ids
from nemo_megacpp.mixers.kernels.rotary import accumulated_angles, from_halves, to_halves


def mamba3_chunked(
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
    *,
    mimo_x: Tensor | None = None,
    pairs: Pairs = "interleaved",
    initial_state: Mamba3State | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Mamba3State]:
    """Scan a batch of rows with Mamba-3's trapezoidal rule; see the module for the equations.

    The trapezoidal rule is a plain scan in disguise: token ``j`` enters every later state with the
    weight ``γ_j + (1 - λ_{j+1}) Δ_{j+1}``, and its own with ``γ_j``. No sum crosses heads.

    Args:
        x: ``[b, l, h, p]``; float64 accumulates in float64, every other dtype in float32.
        B: ``[b, l, r, g, n]`` after its norm; so is C.
        C: of the group; heads fall in ``g`` consecutive blocks.
        B_bias: ``[h, r, n]``.
        C_bias: ``[h, r, n]``.
        dt: ``[b, l, h]``, Δ, positive.
        A: ``[b, l, h]``, negative (``mamba3_state.negative_decay_rate``).
        lam: ``[b, l, h]``, λ in (0, 1).
        angle_rate: ``[b, l, s]``, π·tanh(θ̂), rad per unit of time; ``s`` of ``n/2`` pairs turn.
        D: ``[h]``, the skip weight.
        mimo_x: ``[h, r, p]``; None for SISO (``r = 1``).
        pairs: which state channels turn together: ``'interleaved'`` ``(2i, 2i+1)`` as the Triton
            SISO kernel has it, ``'halves'`` ``(i, i + n/2)`` as the TileLang MIMO kernel.
        initial_state: belongs to the first document of each row.
        seq_idx: integer ``[b, l]``; all parts of the state are zero where the value changes.
        chunk_size: tokens in a chunk; None means ``64 // r``.

    Returns:
        ``o [b, l, h, r, p]`` in the dtype of ``x``, and the final :class:`Mamba3State`.

    Raises:
        UserError: a shape or an option is wrong.
    """
    check_inputs(x, B, C, B_bias, C_bias, dt, A, lam, angle_rate, D, mimo_x, pairs, initial_state)
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"chunk_size must be at least 1 or None, got {chunk_size}.")
    acc = accumulation_dtype(x)
    batch, length, _, _ = x.shape
    rank = B.shape[2]
    size = min(chunk_size or max(64 // rank, 1), length)
    ids = None if seq_idx is None else document_ids(seq_idx, batch, length)
    start = starting_state(x, B, angle_rate.shape[-1], initial_state)
    x_acc, step, mix = x.to(acc), dt.to(acc).contiguous(), lam.to(acc)

    angle = accumulated_angles(angle_rate.to(acc), step, start.angle, ids)
    keys = _rotated(B.to(acc), B_bias.to(acc), angle, pairs, size)  # [b, c, h, q, r, n]
    queries = _rotated(C.to(acc), C_bias.to(acc), angle, pairs, size)
    values = x_acc[:, :, :, None] if mimo_x is None else x_acc[:, :, :, None] * mimo_x.to(acc)
    values = to_chunks(values, size).transpose(2, 3)  # [b, c, h, q, r, p]

    # Δ(1-λ) of the next token: the weight that a token gets when its successor looks back. Where
    # the successor belongs to another document no later token sees it, and `own` takes it off.
    # The row's first token looks back at the initial state.
    look_back = (1 - mix) * step
    shifted = F.pad(look_back[:, 1:], (0, 0, 0, 1))
    weight, own_excess = (
        to_chunks(y, size).transpose(2, 3)[..., None, None] for y in (mix * step + shifted, shifted)
    )
    decays = chunk_decays(
        to_chunks(step * A.to(acc), size).transpose(2, 3),
        None if ids is None else chunked_ids(ids, size),
    )

    flat_keys, flat_queries = keys.flatten(3, 4), queries.flatten(3, 4)
    inputs = values * weight
    scores = (flat_queries @ flat_keys.transpose(-1, -2)).unflatten(-1, (size, rank))
    scores = scores.unflatten(3, (size, rank)) * decays.inner[..., :, None, :, None]
    y = scores.flatten(5).flatten(3, 4) @ inputs.flatten(3, 4)

    added = (inputs * decays.outgoing[..., None, None]).flatten(3, 4).transpose(-1, -2) @ flat_keys
    up = torch.ones_like(D)[:, None, None] if mimo_x is None else mimo_x
    last_pairs = torch.einsum("bhp,hrp,bhrn->bhpn", start.v, up.to(acc), start.k)
    first_state = start.ssm + look_back[:, 0, :, None, None] * last_pairs
    before, final = pass_states(added, decays.total, to_halves(first_state, pairs))
    read = (flat_queries @ before.transpose(-1, -2)).unflatten(3, (size, rank))
    y = torch.addcmul(y.unflatten(3, (size, rank)), read, decays.incoming[..., None, None])

    # A token sees itself with γ only; the scores above gave it its successor's share as well.
    own = scores.diagonal(dim1=3, dim2=5).movedim(-1, 3)  # [b, c, h, q, r, r'], q_r·k_r'
    skip = D.to(acc)[:, None, None, None] * torch.eye(rank, dtype=acc, device=x.device)
    own = skip - own_excess * own
    for i in range(rank):
        y = torch.addcmul(y, own[..., i, None], values[..., i, None, :])
    y = y.transpose(2, 3).flatten(1, 2)[:, :length].to(x.dtype)
    last_key = keys[:, -1, :, (length - 1) % size]
    return y, Mamba3State(
        from_halves(final, pairs), from_halves(last_key, pairs), x_acc[:, -1], angle[:, -1]
    )


def _rotated(projected: Tensor, bias: Tensor, angle: Tensor, pairs: Pairs, size: int) -> Tensor:
    """Add the bias and rotate; cut into chunks, heads first, the state axis in ``'halves'`` order.

    Products of queries and keys do not depend on the order of the state axis, so the scan runs in
    the one whose rotation touches contiguous memory.

    Args:
        projected: ``[b, l, r, g, n]``.
        bias: ``[h, r, n]``.
        angle: ``[b, l, h, s]``.

    Returns:
        ``[b, c, h, q, r, n]``.
    """
    groups, count = projected.shape[3], angle.shape[-1]
    by_group = to_chunks(to_halves(projected, pairs), size).permute(0, 1, 4, 2, 3, 5).contiguous()
    biases = to_halves(bias, pairs).unflatten(0, (groups, -1))[:, :, None]
    shifted = (by_group[:, :, :, None] + biases).flatten(2, 3)
    turns = to_chunks(angle, size).transpose(2, 3)[..., None, :]
    cos, sin = turns.cos(), turns.sin()
    first, second = shifted.unflatten(-1, (2, -1)).unbind(-2)
    a, b = first[..., :count], second[..., :count]
    return torch.cat(
        [a * cos - b * sin, first[..., count:], a * sin + b * cos, second[..., count:]], dim=-1
    )
