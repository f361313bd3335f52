"""Parameters that every tensor-parallel rank holds whole but uses with its own heads only.

Such a parameter is *replicated* on tp: each rank's gradient is partial and someone must sum it.
Megatron sums gradients over tp at the end of a step only with SP on, and only for parameters that
carry ``sequence_parallel``. Without SP nothing would be summed, so the sum is made in the backward
pass, by the operator that copies into the tensor-parallel region.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig


def mark_replicated(parameter: torch.nn.Parameter, config: TransformerConfig) -> None:
    """Tag ``parameter`` so that, with SP on, Megatron sums its gradient over tp once per step."""
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def replicated(
    parameter: torch.Tensor,
    config: TransformerConfig,
    tp_group: torch.distributed.ProcessGroup,
) -> torch.Tensor:
    """Return a replicated parameter for use with this rank's heads.

    R on tp in both cases: with SP the tag of :func:`mark_replicated` gets the gradient summed,
    without SP the backward pass of this call does.
    """
    if config.sequence_parallel or tp_group.size() == 1:
        return parameter
    return copy_to_tensor_model_parallel_region(parameter, group=tp_group)


def sum_over_tp(x: torch.Tensor, tp_group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Sum ``x`` over tp: partial in, replicated out (the backward pass sums as well, because each
    rank goes on to use the sum for its own heads)."""
    if tp_group.size() == 1:
        return x
    return copy_to_tensor_model_parallel_region(
        reduce_from_tensor_model_parallel_region(x, group=tp_group), group=tp_group
    )
