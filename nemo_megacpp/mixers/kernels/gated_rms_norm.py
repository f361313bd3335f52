"""RMS norm over groups of channels with an optional SiLU gate, as Mamba-2 uses before ``out_proj``.

The module has the constructor, the parameter name and the meaning of mamba_ssm's gated ``RMSNorm``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.kernels.packing import accumulation_dtype, check_shapes


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """Normalise each group of ``group_size`` consecutive channels by its root mean square.

    Args:
        x: ``[..., d]``.
        weight: ``[d]``.
        z: ``[..., d]``, the gate: ``norm(x)·silu(z)`` if ``norm_before_gate``, else
            ``norm(x·silu(z))``.
        eps: added to the mean square.
        group_size: channels in a group; None means all ``d``.

    Returns:
        ``[..., d]`` in the dtype of ``x``, computed in at least float32.

    Raises:
        UserError: a shape does not fit, or groups do not divide the channels.
    """
    channels = x.shape[-1]
    group = channels if group_size is None else group_size
    if group < 1 or channels % group:
        raise UserError(f"group_size ({group}) must divide the number of channels ({channels}).")
    check_shapes({"weight": (weight, "d")}, d=channels)
    if z is not None and z.shape != x.shape:
        raise UserError(f"z must have the shape of x {list(x.shape)}, got {list(z.shape)}.")
    acc = accumulation_dtype(x)
    y = x.to(acc)
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.to(acc))
    grouped = y.unflatten(-1, (-1, group))
    scale = torch.rsqrt(grouped.square().mean(dim=-1, keepdim=True) + eps)
    y = (grouped * scale).flatten(-2) * weight.to(acc)
    if z is not None and norm_before_gate:
        y = y * F.silu(z.to(acc))
    return y.to(x.dtype)


class RMSNormGated(nn.Module):
    """:func:`gated_rms_norm` with its ``weight [hidden_size]``, ones at the start.

    Raises:
        UserError: ``group_size`` does not divide ``hidden_size``.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if group_size is not None and (group_size < 1 or hidden_size % group_size):
            raise UserError(f"group_size ({group_size}) must divide hidden_size ({hidden_size}).")
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        # Upstream's module has the entry too; state dicts are the same.
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise ``x [..., hidden_size]``, gated by ``z`` of the same shape if given."""
        return gated_rms_norm(
            x,
            self.weight,
            z,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )
