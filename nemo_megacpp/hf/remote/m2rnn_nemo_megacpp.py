"""The mixer of R: M²RNN, in plain torch. Its state is kept as those of M are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_nemo_megacpp import NemoMegacppConfig
from .parts_nemo_megacpp import Projection, State, convolve, wide


class M2RNN(nn.Module):
    """M²RNN (arXiv 2603.14360), token by token.

    ``H_t = f_t H_{t-1} + (1 - f_t) tanh(H_{t-1} W + k_t v_tᵀ)``, ``y_t = H_tᵀ q_t + D v_t``. Rows:
    ``[q | k]`` shared by all heads, and ``(v, f, g)`` per head.
    """

    def __init__(self, config: NemoMegacppConfig):
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.heads, self.key = config.m2rnn_num_heads, config.m2rnn_key_head_dim
        self.value, taps = config.m2rnn_value_head_dim, config.m2rnn_conv_kernel
        inner = self.heads * self.value
        self.in_proj = Projection(config.hidden_size, 2 * inner + self.heads, 2 * self.key)
        self.conv_weight = nn.Parameter(torch.empty(inner, taps))
        self.shared_conv_weight = nn.Parameter(torch.empty(2 * self.key, taps))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(inner))
        self.state_weight = nn.Parameter(torch.empty(self.heads, self.value, self.value))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.depth_gate = nn.Parameter(torch.empty(inner)) if config.m2rnn_depth_state else None
        self.out_proj = Projection(inner, config.hidden_size)

    def forward(
        self, normed: Tensor, mask: Tensor | None, state: State, depth: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Also take ``[b, s, V]`` from the R block before (None: the first), and hand it on."""
        if mask is not None:
            normed = normed * mask
        shared = F.linear(normed, self.in_proj.shared_weight)
        split = self.in_proj(normed).unflatten(-1, (self.heads, -1))
        v, f, gate = split.split([self.value, 1, self.value], dim=-1)
        channels = convolve(
            torch.cat([shared, v.flatten(2)], dim=-1),
            torch.cat([self.shared_conv_weight, self.conv_weight]),
            None,
            state,
        )
        q, k, v = channels.split([self.key, self.key, self.heads * self.value], dim=-1)
        v = v.unflatten(-1, (self.heads, self.value))
        if self.depth_gate is not None and depth is not None:
            v = v + self.depth_gate.unflatten(0, (self.heads, self.value)) * depth.unsqueeze(2)
        y = self._scan(q, k, v, self._forget(f.squeeze(-1)), state).to(v.dtype)
        y = (y.flatten(2) + self.D * v.flatten(2)).to(v.dtype) * F.silu(gate.flatten(2))
        mean = wide(y).square().mean(-1, keepdim=True)
        y = (wide(y) * torch.rsqrt(mean + self.eps)).to(y.dtype) * self.norm_weight
        handed_on = y.unflatten(-1, (self.heads, self.value)).sum(-2) / self.heads
        return self.out_proj(y), handed_on

    def _forget(self, f: Tensor) -> Tensor:
        f = wide(f)
        rate = F.softplus(f + self.dt_bias.to(f.dtype))
        return torch.exp(-torch.exp(self.A_log.to(f.dtype)) * rate)

    def _scan(self, q: Tensor, k: Tensor, v: Tensor, forget: Tensor, state: State) -> Tensor:
        """Return ``y [b, s, n, V]`` of ``q`` and ``k`` ``[b, s, K]`` and ``v [b, s, n, V]``."""
        q, k, v, W = wide(q), wide(k), wide(v), wide(self.state_weight)
        H = state.get("matrix")
        if H is None:
            H = v.new_zeros(v.size(0), self.heads, self.key, self.value)
        outputs = []
        for t in range(v.size(1)):
            f = forget[:, t, :, None, None]
            new = torch.tanh(H @ W + k[:, t, None, :, None] * v[:, t, :, None, :])
            H = f * H + (1 - f) * new
            outputs.append((q[:, t, None, None, :] @ H).squeeze(-2))
        state["matrix"] = H
        return torch.stack(outputs, dim=1)
