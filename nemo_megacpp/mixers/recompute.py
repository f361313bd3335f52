"""Recompute: save what goes into a region, and run the region again in the backward pass.

Megatron's ``tensor_parallel.checkpoint`` draws the same dropout masks in both passes. The first one
builds no graph, so what Megatron counts only where gradients are on, auxiliary losses and the
tokens of an expert, is counted once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig

Forward = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Result = TypeVar("Result")


def recompute(
    region: Callable[..., Result], hidden_states: torch.Tensor, *others: torch.Tensor | None
) -> Result:
    """Return ``region(hidden_states, *others)``, and save its inputs alone for the backward pass.

    A gradient reaches the inputs only, so the region must not close over a tensor that needs one.

    Without gradients (in an evaluation) the region just runs.
    """
    if not torch.is_grad_enabled():
        return region(hidden_states, *others)
    if not hidden_states.requires_grad:
        # The embedding may be frozen. Autograd calls a checkpoint's backward pass only if an input
        # requires a gradient; the region's parameters would get none.
        hidden_states = hidden_states.detach().requires_grad_()
    result: Result = tensor_parallel.checkpoint(region, False, hidden_states, *others)
    return result


def recomputes(config: TransformerConfig, module: str) -> bool:
    """Return whether ``recompute_modules`` names ``module``."""
    modules = config.recompute_modules or ()
    return config.recompute_granularity == "selective" and module in modules


def recomputable(module: str) -> Callable[[Forward], Forward]:
    """Make a mixer's ``forward`` one that is recomputed if ``recompute_modules`` names ``module``.

    For mixers of Megatron's ``MambaLayer``: ``forward(hidden_states, *tensors, …)`` returns the
    output and another tensor or None. Tensors that need a gradient are positional.
    """

    def decorate(forward: Forward) -> Forward:
        @wraps(forward)
        def run(
            self: Any, hidden_states: torch.Tensor, *tensors: torch.Tensor | None, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            if not (self.training and recomputes(self.config, module)):
                return forward(self, hidden_states, *tensors, **kwargs)
            return recompute(partial(forward, self, **kwargs), hidden_states, *tensors)

        return run

    return decorate
