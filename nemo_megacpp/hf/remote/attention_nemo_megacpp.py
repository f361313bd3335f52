"""The mixer of A: attention, with a cache of keys and values."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_nemo_megacpp import NemoMegacppConfig
from .parts_nemo_megacpp import NormProjection, State


class Attention(nn.Module):
    """Megatron's ``SelfAttention``: rows by group, ``q… (gate…) k v``; RoPE over halves."""

    def __init__(self, config: NemoMegacppConfig):
        super().__init__()
        self.config = config
        self.heads, self.groups, self.dim = (
            config.num_attention_heads,
            config.num_query_groups,
            config.kv_channels,
        )
        self.per_group = self.heads // self.groups
        queries = self.per_group * (2 if config.attention_output_gate else 1)
        self.sizes = [
            self.per_group * self.dim,
            *([self.per_group * self.dim] if config.attention_output_gate else []),
            self.dim,
            self.dim,
        ]
        self.linear_qkv = NormProjection(
            config.hidden_size,
            self.groups * (queries + 2) * self.dim,
            config.layernorm_epsilon,
            bias=config.add_bias_linear or config.add_qkv_bias,
        )
        self.linear_proj = nn.Linear(
            self.heads * self.dim, config.hidden_size, bias=config.add_bias_linear
        )

    def forward(
        self, hidden: Tensor, positions: Tensor, visible: Tensor | None, state: State
    ) -> Tensor:
        rows = self.linear_qkv(self.linear_qkv.norm(hidden)).unflatten(-1, (self.groups, -1))
        q, *gate, k, v = rows.split(self.sizes, dim=-1)
        q = q.reshape(*hidden.shape[:2], self.heads, self.dim)
        if self.config.position_embedding_type == "rope":
            q, k = (self._rotate(t, positions) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if state:
            k, v = torch.cat([state["k"], k], dim=2), torch.cat([state["v"], v], dim=2)
        state["k"], state["v"] = k, v
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            is_causal=visible is None and q.size(2) > 1,
            scale=self.config.softmax_scale or 1 / math.sqrt(self.dim),
            enable_gqa=self.heads != self.groups,
        )
        context = context.transpose(1, 2).flatten(2)
        if gate:
            opened = torch.sigmoid(gate[0].flatten(2).float())
            context = (context * opened).to(context.dtype)
        return self.linear_proj(context)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate channels ``(i, i + d/2)`` of ``[b, s, n, dim]``, the first ``rotary_percent``."""
        turned = self.dim
        if self.config.rotary_percent < 1:
            turned = int(self.dim * self.config.rotary_percent)
        powers = torch.arange(0, turned, 2, dtype=torch.float32, device=x.device) / turned
        angle = positions.to(powers.dtype)[..., None] * (1.0 / self.config.rotary_base**powers)
        angle = torch.cat([angle, angle], dim=-1)[:, :, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        x, rest = x[..., :turned], x[..., turned:]
        first, second = x.chunk(2, dim=-1)
        x = x * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([x, rest], dim=-1)
