"""Parameters that every tensor-parallel rank holds whole but uses with its own heads only.

Such a parameter is *replicated* on tp: each rank's gradient is partial and someone must sum it.
Megatron sums gradients over tp at the end of a step only with SP on, and only for parameters that
carry ``sequence_parallel``. Without SP nothing would be summed, so the sum is made in the backward
pass, by the operator that copies into the tensor-parallel region.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


class _SumGradient(torch.autograd.Function):
    """Identity forward, all-reduce of the gradient backward.

    Megatron's ``copy_to_tensor_model_parallel_region`` does the same, but reduces
    ``grad.contiguous()`` in place and returns ``grad``: for a gradient that is not contiguous (a
    transposed convolution weight, say) the sum is made on a copy and lost.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        total = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class _SumBoth(_SumGradient):
    """All-reduce forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total


def mark_replicated(parameter: torch.nn.Parameter, config: TransformerConfig) -> None:
    """Tag ``parameter`` so that, with SP on, Megatron sums its gradient over tp once per step.

    ``sums_over_tp`` says to a reader (:mod:`nemo_megacpp.contract`) what it is in both cases.
    """
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    parameter.sums_over_tp = True  # type: ignore[attr-defined]


def replicated(
    parameter: torch.Tensor, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Return a replicated parameter for use with this rank's heads.

    R on tp in both cases: with SP the tag of :func:`mark_replicated` gets the gradient summed,
    without SP the backward pass of this call does.
    """
    if config.sequence_parallel or tp_group.size() == 1:
        return parameter
    return _SumGradient.apply(parameter, tp_group)


def sum_over_tp(x: torch.Tensor, tp_group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Sum ``x`` over tp: partial in, replicated out (the backward pass sums as well, because each
    rank uses the sum for its own heads)."""
    if tp_group.size() == 1:
        return x
    return _SumBoth.apply(x, tp_group)
