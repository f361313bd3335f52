"""Move the activations of a model by as much as one rounding to bfloat16 may."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.proof.points import Point, tap

UNIT = 2.0**-8
"""Unit roundoff of bfloat16: eight bits of significand, so half a unit in the last place."""


def perturb(chunks: Sequence[torch.nn.Module], config: HybridConfig, seed: int) -> None:
    """Multiply every watched bfloat16 activation, and its gradient, by ``1 ± 2⁻⁸`` at random.

    Args:
        chunks: model chunks, unwrapped.
        config: of the model.
        seed: of the signs.
    """
    generator = torch.Generator().manual_seed(seed)

    def move(point: Point, tensor: torch.Tensor) -> torch.Tensor | None:
        if tensor.dtype != torch.bfloat16 or not tensor.requires_grad:
            return None  # routing probabilities are float32
        return _Move.apply(tensor, generator)

    tap(chunks, config, move)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        ctx.generator = generator
        return _moved(x, generator)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _moved(grad, ctx.generator), None


def _moved(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    sign = 2 * torch.randint(2, x.shape, generator=generator, dtype=torch.float32) - 1
    return (x.float() * (1 + UNIT * sign.to(x.device))).to(x.dtype)
