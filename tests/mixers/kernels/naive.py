"""Reference loops of the scans and the convolution: the equations, one token at a time.

M²RNN's is in ``benchmarks/m2rnn.py``, which checks the kernels on a user's GPU with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_megacpp.mixer_settings import Mamba3Dimensions, Pairs
from nemo_megacpp.mixers.kernels.mamba3_state import Mamba3State, starting_state
from nemo_megacpp.mixers.kernels.packing import accumulation_dtype
from nemo_megacpp.mixers.kernels.rotary import TWO_PI
from nemo_megacpp.mixers.kernels.ssd import Output, skip_and_gate, step_size
from nemo_megacpp.mixers.mamba3_rows import rows_of_group_state, rows_per_head, split_rows


def rotate(x: Tensor, angle: Tensor, pairs: Pairs) -> Tensor:
    """Rotate the first ``s`` pairs of the last axis of ``x [..., n]`` by ``angle [..., s]`` (rad).

    Pair ``i`` is ``(2i, 2i+1)`` for ``'interleaved'`` and ``(i, i + n/2)`` for ``'halves'``.
    """
    grouped = x.unflatten(-1, (-1, 2) if pairs == "interleaved" else (2, -1))
    first, second = grouped.unbind(-1 if pairs == "interleaved" else -2)
    count = angle.shape[-1]
    a, b = first[..., :count], second[..., :count]
    cos, sin = angle.cos(), angle.sin()
    first = torch.cat([a * cos - b * sin, first[..., count:]], dim=-1)
    second = torch.cat([a * sin + b * cos, second[..., count:]], dim=-1)
    return torch.stack([first, second], dim=-1 if pairs == "interleaved" else -2).flatten(-2)


def causal_conv1d_naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Reference for :func:`causal_conv1d`: one token at a time, a sliding window as state."""
    acc = accumulation_dtype(x)
    batch, length, channels = x.shape
    taps = weight.to(acc)
    window = x.new_zeros(batch, channels, taps.shape[1] - 1, dtype=acc)
    if initial_state is not None:
        window = initial_state.to(acc)
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            same = seq_idx[:, t] == seq_idx[:, t - 1]
            window = torch.where(same[:, None, None], window, torch.zeros_like(window))
        window = torch.cat([window, x[:, t, :, None].to(acc)], dim=2)
        y = (window * taps).sum(dim=2)
        if bias is not None:
            y = y + bias.to(acc)
        outputs.append(F.silu(y) if activation == "silu" else y)
        window = window[:, :, 1:]
    return torch.stack(outputs, dim=1).to(x.dtype)


def ssd_naive(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Output:
    """Reference for :func:`ssd_chunked` (no ``chunk_size``): the recurrence, token by token."""
    acc = accumulation_dtype(x)
    batch, length, heads, head_dim = x.shape
    x_acc, A_acc = x.to(acc), A.to(acc)
    step = step_size(dt, dt_bias, dt_softplus, acc)
    per_group = heads // B.shape[2]
    B_heads = B.to(acc).repeat_interleave(per_group, dim=2)
    C_heads = C.to(acc).repeat_interleave(per_group, dim=2)
    state = x_acc.new_zeros(batch, heads, head_dim, B.shape[3])
    if initial_states is not None:
        state = initial_states.to(acc)
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            same = seq_idx[:, t] == seq_idx[:, t - 1]
            state = torch.where(same[:, None, None, None], state, torch.zeros_like(state))
        decay = torch.exp(step[:, t] * A_acc)
        update = (step[:, t, :, None] * x_acc[:, t])[..., None] * B_heads[:, t, :, None]
        state = decay[..., None, None] * state + update
        outputs.append((state * C_heads[:, t, :, None]).sum(dim=-1))
    y = skip_and_gate(torch.stack(outputs, dim=1), x_acc, D, z).to(x.dtype)
    return (y, state) if return_final_states else y


def mamba3_naive(
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
) -> tuple[Tensor, Mamba3State]:
    """Reference for :func:`mamba3_chunked` (no ``chunk_size``): the equations, token by token."""
    acc = accumulation_dtype(x)
    heads, groups = x.shape[2], B.shape[3]
    ssm, k_last, x_last, angle = starting_state(x, B, angle_rate.shape[-1], initial_state)
    up = torch.ones_like(x[0, 0, :, None]) if mimo_x is None else mimo_x
    up, D_acc = up.to(acc), D.to(acc)

    def per_head(y: Tensor, bias: Tensor) -> Tensor:
        return y.to(acc).repeat_interleave(heads // groups, dim=2).transpose(1, 2) + bias.to(acc)

    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            same = seq_idx[:, t] == seq_idx[:, t - 1]
            ssm, k_last, x_last, angle = (
                torch.where(same.view(-1, *[1] * (y.dim() - 1)), y, torch.zeros_like(y))
                for y in (ssm, k_last, x_last, angle)
            )
        x_t, step, mix = x[:, t].to(acc), dt[:, t].to(acc), lam[:, t].to(acc)
        angle = (angle + angle_rate[:, t, None].to(acc) * step[..., None]).remainder(TWO_PI)
        k = rotate(per_head(B[:, t], B_bias), angle[:, :, None], pairs)
        q = rotate(per_head(C[:, t], C_bias), angle[:, :, None], pairs)
        alpha = torch.exp(A[:, t].to(acc) * step)
        gamma, beta = mix * step, (1 - mix) * step * alpha
        v, v_last = x_t[:, :, None] * up, x_last[:, :, None] * up
        ssm = (
            alpha[..., None, None] * ssm
            + beta[..., None, None] * torch.einsum("bhrp,bhrn->bhpn", v_last, k_last)
            + gamma[..., None, None] * torch.einsum("bhrp,bhrn->bhpn", v, k)
        )
        outputs.append(torch.einsum("bhpn,bhrn->bhrp", ssm, q) + D_acc[:, None, None] * v)
        k_last, x_last = k, x_t
    return torch.stack(outputs, dim=1).to(x.dtype), Mamba3State(ssm, k_last, x_last, angle)


def rows_in_mamba_ssm_order(dims: Mamba3Dimensions) -> torch.Tensor:
    """Return the permutation from our rows to those of mamba_ssm's ``Mamba3.in_proj``.

    Returns:
        int64 ``[split_rows + S]``, with ``their_weight = cat([weight, shared_weight])[rows]`` for
        whole (tp=1) weights; ``rows.argsort()`` leads back.
    """
    state_rows, head_dim = rows_of_group_state(dims), dims.head_dim
    split = torch.arange(split_rows(dims))
    by_group = split.view(dims.num_groups, -1)
    states = by_group[:, :state_rows].unflatten(1, (2, dims.mimo_rank, dims.state_dim))
    heads = by_group[:, state_rows:].reshape(dims.num_heads, rows_per_head(dims))
    z, x, dd_dt, dd_A, trap = heads.split([head_dim, head_dim, 1, 1, 1], dim=1)
    B, C = states.permute(1, 2, 0, 3)  # (r, g, n)
    theta = len(split) + torch.arange(dims.num_angles)
    return torch.cat([rows.flatten() for rows in (z, x, B, C, dd_dt, dd_A, trap, theta)])
