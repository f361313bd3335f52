"""RMS normalisation of the torch backend."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import random
from megatron.core.transformer import TransformerConfig
from torch.nn import functional as F

from nemo_megacpp.errors import UserError


def validate_torch_norm(config: TransformerConfig) -> None:
    """Validate what the torch backend's modules support.

    Raises:
        UserError: a normalisation other than plain RMSNorm; FP8, which Megatron silently ignores
            without Transformer Engine; experts with biases; or the recomputation of modules, all of
            which need Transformer Engine.
    """
    if config.recompute_granularity == "selective":
        lacking = [] if hasattr(random, "FP8GlobalStateManager") else ["layernorm"]
        for name in (*lacking, "moe_act"):
            if name in config.recompute_modules:  # type: ignore[operator]
                raise UserError(
                    f"recompute_modules={config.recompute_modules}: recomputing {name} needs "
                    f"Transformer Engine, which is not installed. Install it, or leave {name} out."
                )
    if config.fp8:
        raise UserError(
            f"fp8={config.fp8!r} needs Transformer Engine, which is not installed. Install it, or "
            f"leave fp8 out."
        )
    if config.add_bias_linear and config.num_moe_experts:
        raise UserError(
            "add_bias_linear=True with E blocks needs Transformer Engine, which is not installed. "
            "Install it, or leave add_bias_linear at False."
        )
    if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
        raise UserError(
            f"The torch backend supports normalization='RMSNorm' with a gain around one; got "
            f"{config.normalization!r}, layernorm_zero_centered_gamma="
            f"{config.layernorm_zero_centered_gamma}. Install Transformer Engine or change these."
        )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float | None) -> torch.Tensor:
    """Normalize the last axis of ``x``.

    The parts of the input's gradient are summed before the residual's is added, as in a fused norm:
    in one order, whether the norm is recomputed or not.
    """
    return F.rms_norm(x.view_as(x), weight.shape, weight, eps)


class TorchRMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` with the constructor and the parameter tags that Megatron expects.

    Input and output ``[s, b, h]``; under SP, ``s`` is this rank's share. ``weight``: replicated on
    tp with SP (its gradient is partial; Megatron sums it over tp at the end of the step because of
    the ``sequence_parallel`` tag), invariant on tp without SP. Megatron's own ``WrappedTorchNorm``
    refuses SP.

    Args:
        config: Megatron's model configuration.
        hidden_size: ``h``.
        eps: added to the mean square; ``config.layernorm_epsilon`` if not given.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float | None = None):
        validate_torch_norm(config)
        super().__init__(
            hidden_size,
            eps=config.layernorm_epsilon if eps is None else eps,
            dtype=config.params_dtype,
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last axis."""
        return rms_norm(x, self.weight, self.eps)


class NormOfConfig:
    """Builds ``norm`` with ``config.layernorm_epsilon``.

    Until 0.18 Megatron's ``MambaLayer`` builds its norm without an epsilon, and Transformer
    Engine's norm then has 1e-5 in place of the configuration's.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, norm: type, eps: float | None = None
    ) -> torch.nn.Module:
        return norm(config, hidden_size, eps=config.layernorm_epsilon)
