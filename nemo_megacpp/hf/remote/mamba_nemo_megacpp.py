"""The mixers of M: Mamba-2 and Mamba-3, in plain torch.

Each maps ``[b, s, h]`` to ``[b, s, h]`` and takes its state from a dictionary, in which it leaves
the state after the last token; an empty dictionary is the start of a sequence. A step costs the
same whatever came before. Parameters have Megatron's names; in a model of bfloat16 or float16 the
states, decays and step sizes are float32.

Mamba-2's scan is ``mamba_ssm``'s kernel where that package is installed and the model is on a GPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_nemo_megacpp import NemoMegacppConfig
from .parts_nemo_megacpp import NormProjection, Projection, Scale, State, convolve, wide

try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:
    mamba_chunk_scan_combined = None

CHUNK = 64
"""Tokens that Mamba-2's scan takes at a time."""
_GATED_NORM_EPS = 1e-5  # of Megatron's MambaMixer, which the configuration cannot change


class Mamba2(nn.Module):
    """Megatron's ``MambaMixer``: rows ``[z | x | B | C | dt]``, scan, gated norm over each group.

    ``H_t = exp(dt_t·A) H_{t-1} + dt_t x_t B_tᵀ``, ``y_t = H_t C_t + D x_t``.
    """

    def __init__(self, config: NemoMegacppConfig):
        super().__init__()
        self.heads, self.dim = config.mamba_num_heads, config.mamba_head_dim
        self.groups, self.size = config.mamba_num_groups, config.mamba_state_dim
        inner, states = self.heads * self.dim, self.groups * self.size
        channels = inner + 2 * states
        self.sizes = [inner, channels, self.heads]
        self.in_proj = NormProjection(
            config.hidden_size, inner + channels + self.heads, config.layernorm_epsilon
        )
        self.conv1d = nn.Conv1d(channels, channels, 4, groups=channels)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = Scale(inner)
        self.out_proj = Projection(inner, config.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor | None, state: State) -> Tensor:
        normed = self.in_proj.norm(hidden)
        if mask is not None:
            normed = normed * mask
        z, channels, dt = self.in_proj(normed).split(self.sizes, dim=-1)
        channels = convolve(channels, self.conv1d.weight.squeeze(1), self.conv1d.bias, state)
        if mask is not None:  # the bias passes the convolution
            channels = channels * mask
        x, B, C = channels.split([self.sizes[0], *[self.groups * self.size] * 2], dim=-1)
        y = self._scan(
            x.unflatten(-1, (self.heads, self.dim)),
            dt,
            B.unflatten(-1, (self.groups, self.size)),
            C.unflatten(-1, (self.groups, self.size)),
            state,
        )
        y = wide((wide(y).flatten(2) * F.silu(wide(z))).to(hidden.dtype))
        by_group = y.unflatten(-1, (self.groups, -1))
        scale = torch.rsqrt(by_group.square().mean(-1, keepdim=True) + _GATED_NORM_EPS)
        y = (by_group * scale).flatten(2) * wide(self.norm.weight)
        return self.out_proj(y.to(hidden.dtype))

    def _scan(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: State) -> Tensor:
        """Scan ``x [b, s, h, p]`` with ``B`` and ``C`` ``[b, s, g, n]``."""
        A = -torch.exp(self.A_log.float())
        has_kernel = mamba_chunk_scan_combined is not None and x.dtype != torch.float64
        if x.is_cuda and has_kernel and x.size(1) > 1:
            y, state["ssm"] = mamba_chunk_scan_combined(
                *(x, dt, A, B, C, 2 * CHUNK),
                D=self.D,
                dt_bias=self.dt_bias.float(),
                dt_softplus=True,
                initial_states=state.get("ssm"),
                return_final_states=True,
            )
            return y
        kind = wide(x).dtype
        step = F.softplus(dt.to(kind) + self.dt_bias.float().to(kind))
        B, C = (
            t.to(kind).repeat_interleave(self.heads // self.groups, dim=2).transpose(1, 2)
            for t in (B, C)
        )  # [b, h, s, n]
        values = x.to(kind).transpose(1, 2)  # [b, h, s, p]
        steps = step.transpose(1, 2)  # [b, h, s]
        before = state.get("ssm")
        if before is None:
            before = values.new_zeros(*values.shape[:2], self.dim, self.size)
        outputs = []
        for start in range(0, x.size(1), CHUNK):
            here = slice(start, start + CHUNK)
            y, before = _chunk(
                values[:, :, here],
                steps[:, :, here],
                A.to(kind),
                B[:, :, here],
                C[:, :, here],
                before,
            )
            outputs.append(y)
        state["ssm"] = before
        y = torch.cat(outputs, dim=2) + self.D.to(kind)[:, None, None] * values
        return y.transpose(1, 2)


def _chunk(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Scan one chunk of ``[b, h, q, ·]`` from the state ``[b, h, p, n]``; return the next one."""
    log_decay = step * A[:, None]  # [b, h, q]
    length = x.size(2)
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
    # Sums over (i, j], each on its own: differences of one running sum would lose digits.
    between = log_decay.unsqueeze(-1).expand(*log_decay.shape, length)
    between = between.masked_fill(~later, 0).cumsum(-2)
    causal = later | torch.eye(length, dtype=torch.bool, device=x.device)
    decay = between.masked_fill(~causal, -math.inf).exp()
    weighted = x * step.unsqueeze(-1)
    from_start = log_decay.cumsum(-1).exp().unsqueeze(-1)  # [b, h, q, 1]
    inside = (C @ B.transpose(-1, -2) * decay) @ weighted
    y = inside + from_start * (C @ before.transpose(-1, -2))
    to_end = decay[..., -1, :].unsqueeze(-1)
    after = from_start[..., -1:, :] * before + (weighted * to_end).transpose(-1, -2) @ B
    return y, after


class Mamba3(nn.Module):
    """Mamba-3, single-input (SISO) and multi-input (MIMO), token by token.

    With ``θ`` the accumulated angle, ``k = Rot_θ(B + B_bias)``, ``q = Rot_θ(C + C_bias)``::

        S_t = α_t S_{t-1} + β_t Σ_r v_{t-1,r} k_{t-1,r}ᵀ + γ_t Σ_r v_{t,r} k_{t,r}ᵀ
        o_{t,r} = S_t q_{t,r} + D v_{t,r}

    Rows by group: ``B (r, n) | C (r, n)`` and, per head, ``z (p) | x (p) | dd_dt | dd_A | trap``.
    """

    def __init__(self, config: NemoMegacppConfig):
        super().__init__()
        self.config = config
        self.heads, self.dim = config.mamba_num_heads, config.mamba_head_dim
        self.groups, self.size = config.mamba_num_groups, config.mamba_state_dim
        self.rank = config.mamba3_mimo_rank
        self.state_rows = 2 * self.rank * self.size
        rows = self.groups * self.state_rows + self.heads * (2 * self.dim + 3)
        self.in_proj = Projection(config.hidden_size, rows, config.mamba3_num_angles)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.B_bias = nn.Parameter(torch.ones(self.heads, self.rank, self.size))
        self.C_bias = nn.Parameter(torch.ones(self.heads, self.rank, self.size))
        self.B_norm_weight = nn.Parameter(torch.ones(self.size))
        self.C_norm_weight = nn.Parameter(torch.ones(self.size))
        if self.rank > 1:
            for name in ("mimo_x", "mimo_z", "mimo_o"):
                weight = torch.ones(self.heads, self.rank, self.dim)
                self.register_parameter(name, nn.Parameter(weight))
        if config.mamba3_output_norm:
            self.norm_weight = nn.Parameter(torch.ones(self.heads * self.dim))
        self.out_proj = Projection(self.heads * self.dim, config.hidden_size)

    def forward(self, normed: Tensor, mask: Tensor | None, state: State) -> Tensor:
        if mask is not None:
            normed = normed * mask
        theta = F.linear(normed, self.in_proj.shared_weight)
        by_group = self.in_proj(normed).unflatten(-1, (self.groups, -1))
        states, heads = by_group.split(
            [self.state_rows, by_group.size(-1) - self.state_rows], dim=-1
        )
        B, C = states.unflatten(-1, (2, self.rank, self.size)).unbind(3)  # [b, s, g, r, n]
        heads = heads.unflatten(-1, (-1, 2 * self.dim + 3)).flatten(2, 3)
        z, x, *numbers = heads.split([self.dim, self.dim, 1, 1, 1], dim=-1)
        dd_dt, dd_A, trap = (wide(number.squeeze(-1)) for number in numbers)  # [b, s, h]
        dt = F.softplus(dd_dt + self.dt_bias.to(dd_dt.dtype))
        o = self._scan(
            x,
            self._per_head(B, self.B_norm_weight, self.B_bias),
            self._per_head(C, self.C_norm_weight, self.C_bias),
            dt,
            self._decay_rate(dd_A),
            torch.sigmoid(trap),
            math.pi * torch.tanh(wide(theta)),
            state,
        ).to(x.dtype)
        return self.out_proj(self._gate(wide(o), wide(z)).to(x.dtype))

    def _per_head(self, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Norm, share out to heads and add the bias: ``[b, s, g, r, n]`` to ``[b, s, h, r, n]``."""
        normed = F.rms_norm(y, (self.size,), weight, self.config.layernorm_epsilon)
        y = wide(normed).repeat_interleave(self.heads // self.groups, dim=2)
        return y + bias.to(y.dtype)

    def _decay_rate(self, x: Tensor) -> Tensor:
        if self.config.mamba3_A_activation == "softplus":
            rate = F.softplus(x)
        else:  # heavy_tail
            rate = torch.where(x >= 0, 1 + x, 1 / (1 - x.clamp(max=0)))
        return (-rate).clamp(max=-self.config.mamba3_A_floor)

    def _scan(
        self,
        x: Tensor,
        B: Tensor,
        C: Tensor,
        dt: Tensor,
        A: Tensor,
        mix: Tensor,
        rate: Tensor,
        state: State,
    ) -> Tensor:
        """Return ``o [b, s, h, r, p]``."""
        kind = B.dtype
        x = x.to(kind)
        up = self.mimo_x.to(kind) if self.rank > 1 else x.new_ones(1, 1, 1)
        if not state:
            batch, heads = x.size(0), self.heads
            state["ssm"] = x.new_zeros(batch, heads, self.dim, self.size)
            state["k"] = x.new_zeros(batch, heads, self.rank, self.size)
            state["x"] = x.new_zeros(batch, heads, self.dim)
            state["angle"] = x.new_zeros(batch, heads, rate.size(-1), dtype=torch.float64)
        ssm, k, last, angle = (state[name] for name in ("ssm", "k", "x", "angle"))
        outputs = []
        for t in range(x.size(1)):
            step = dt[:, t]
            # In float64: after thousands of tokens the sum is far larger than 2π.
            turned = rate[:, t, None].double() * step[..., None].double()
            angle = (angle + turned).remainder(2 * math.pi)
            turn = angle.to(kind)[:, :, None]
            before = (1 - mix[:, t]) * step * torch.exp(A[:, t] * step)
            v_last, k_last = last[:, :, None] * up, k
            last, k = x[:, t], self._rotate(B[:, t], turn)
            v = last[:, :, None] * up
            ssm = (
                torch.exp(A[:, t] * step)[..., None, None] * ssm
                + before[..., None, None] * (v_last.transpose(-1, -2) @ k_last)
                + (mix[:, t] * step)[..., None, None] * (v.transpose(-1, -2) @ k)
            )
            read = self._rotate(C[:, t], turn) @ ssm.transpose(-1, -2)
            outputs.append(read + self.D.to(kind)[:, None, None] * v)
        state.update(ssm=ssm, k=k, x=last, angle=angle)
        return torch.stack(outputs, dim=1)

    def _rotate(self, y: Tensor, angle: Tensor) -> Tensor:
        """Rotate the first pairs of the last axis of ``[b, h, r, n]`` by ``[b, h, 1, pairs]``."""
        neighbours = self.config.mamba3_pairs == "interleaved"
        grouped = y.unflatten(-1, (-1, 2) if neighbours else (2, -1))
        axis, count = -1 if neighbours else -2, angle.size(-1)
        first, second = grouped.unbind(axis)
        a, b, cos, sin = first[..., :count], second[..., :count], angle.cos(), angle.sin()
        first = torch.cat([a * cos - b * sin, first[..., count:]], dim=-1)
        second = torch.cat([a * sin + b * cos, second[..., count:]], dim=-1)
        return torch.stack([first, second], dim=axis).flatten(-2)

    def _gate(self, o: Tensor, z: Tensor) -> Tensor:
        """Norm, gate, and sum ``[b, s, h, r, p]`` over r; ``z`` is ``[b, s, h, p]``."""
        z = z.unsqueeze(3)
        if self.config.mamba3_output_norm:
            weight = self.norm_weight.to(o.dtype).view(-1, 1, self.dim)
            o = F.rms_norm(o, (self.dim,), eps=self.config.layernorm_epsilon) * weight
        if self.rank == 1:
            return (o * F.silu(z)).flatten(2)
        gated = self.mimo_o.to(o.dtype) * o * F.silu(z * self.mimo_z.to(o.dtype))
        return gated.sum(3).flatten(2)
