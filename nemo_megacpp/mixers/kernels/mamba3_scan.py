"""Mamba-3's scan, single- and multi-input, by chunks.

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
from nemo_megacpp.mixers.kernels.chunk_scan import chunk_scan
from nemo_megacpp.mixers.kernels.chunks import (
    cut_into_chunks,
    from_chunks,
    last_token,
    to_chunks,
)
from nemo_megacpp.mixers.kernels.mamba3_state import Mamba3State, check_inputs, starting_state
from nemo_megacpp.mixers.kernels.packing import accumulation_dtype
from nemo_megacpp.mixers.kernels.rotary import (
    accumulated_angles,
    from_halves,
    rotate_with_bias,
    to_halves,
)


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
    chunks = cut_into_chunks(batch, length, chunk_size or max(64 // B.shape[2], 1), seq_idx)
    start = starting_state(x, B, angle_rate.shape[-1], initial_state)
    step, mix = dt.to(acc).contiguous(), lam.to(acc)

    # Δ(1-λ) of the next token: the weight that a token gets when its successor looks back. The
    # row's first token looks back at the initial state.
    look_back = (1 - mix) * step
    shifted = F.pad(look_back[:, 1:], (0, 0, 0, 1))
    if seq_idx is not None:
        ends = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (0, 1))
        shifted = shifted.masked_fill(ends[..., None], 0)
    own = mix * step
    weight = own + shifted
    # A token sees itself with γ only. A weight of zero (Δ that underflowed) must not divide.
    positive = weight > 0
    diagonal = torch.where(positive, own / torch.where(positive, weight, 1), 1)

    cut_step = to_chunks(step, chunks)
    angle = accumulated_angles(
        to_chunks(angle_rate.to(acc), chunks), cut_step, start.angle, chunks.starts
    )

    def cut(y: Tensor) -> Tensor:
        return to_chunks(to_halves(y.to(acc), pairs).transpose(2, 3), chunks)

    keys, queries = rotate_with_bias(
        cut(B), cut(C), to_halves(B_bias.to(acc), pairs), to_halves(C_bias.to(acc), pairs), angle
    )  # [b, c, q, h, r, n]
    x_acc = x.to(acc)
    values = to_chunks(x_acc, chunks).unsqueeze(4)
    up = None if mimo_x is None else mimo_x.to(acc)
    last = start.v[:, :, None]
    if up is not None:
        values, last = values * up, last * up
    last_pairs = last.transpose(2, 3) @ start.k
    first_state = start.ssm + look_back[:, 0, :, None, None] * last_pairs
    y, final = chunk_scan(
        values,
        keys,
        queries,
        cut_step * to_chunks(A.to(acc), chunks),
        to_chunks(weight, chunks),
        diagonal=to_chunks(diagonal, chunks),
        D=D.to(acc),
        initial=to_halves(first_state, pairs),
        starts=chunks.starts,
    )
    return from_chunks(y, chunks).to(x.dtype), Mamba3State(
        from_halves(final, pairs),
        from_halves(last_token(keys, chunks), pairs),
        x_acc[:, -1],
        last_token(angle, chunks),
    )
