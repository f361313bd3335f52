"""What the layers of an exported model share: projections, norms, the short convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]
"""What a layer keeps of a sequence, by name."""


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, state: State) -> Tensor:
    """Return ``SiLU`` of a causal depthwise convolution of ``x [b, s, c]`` with ``weight [c, w]``.

    ``state["conv"]`` holds the last ``w - 1`` inputs, ``[b, w - 1, c]``.
    """
    taps = weight.size(1)
    before = state.get("conv")
    if before is None:
        before = x.new_zeros(x.size(0), taps - 1, x.size(2))
    window = torch.cat([before, x], dim=1)
    state["conv"] = window[:, window.size(1) - (taps - 1) :]
    kind = torch.promote_types(x.dtype, torch.float32)
    total = sum(
        window[:, tap : tap + x.size(1)].to(kind) * weight[:, tap].to(kind) for tap in range(taps)
    )
    if bias is not None:
        total = total + bias.to(kind)
    return F.silu(total).to(x.dtype)


class Projection(nn.Module):
    """Holds ``weight [out, in]`` and, where given, rows that all heads share."""

    def __init__(self, inputs: int, outputs: int, shared: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        if shared:
            self.shared_weight = nn.Parameter(torch.empty(shared, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Scale(nn.Module):
    """Holds the ``weight`` of a norm."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class NormProjection(Projection):
    """An RMS norm and a linear, under the names of Megatron's fused module."""

    def __init__(self, inputs: int, outputs: int, eps: float, bias: bool = False):
        super().__init__(inputs, outputs)
        self.layer_norm_weight = nn.Parameter(torch.ones(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.eps = eps

    def norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
