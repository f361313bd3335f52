"""Megatron's ``TransformerLayer`` with attention or an MLP alone, corrected where its MLP is
recomputed."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer


class AttentionLayer(TransformerLayer):
    """Megatron's ``TransformerLayer``, which recomputes no MLP as it has none.

    With ``recompute_modules=['mlp']`` Megatron-Core 0.16.1 makes a recomputed region of what stands
    in the MLP's place and returns its input. It would save the hidden states for it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recompute_mlp = False


class FeedForwardLayer(TransformerLayer):
    """Megatron's ``TransformerLayer``, whose MLP gets its gradients behind a frozen embedding too.

    With ``recompute_modules=['mlp']`` Megatron-Core 0.16.1 recomputes the MLP with the norm that is
    fused into it, so a first layer's region takes the embedding's output itself. Autograd calls the
    backward pass of a recomputed region only if its input requires a gradient.
    """

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        """See Megatron's; ``hidden_states`` is ``[s, b, h]``, under SP ``[s/tp, b, h]``."""
        if self.recompute_mlp and torch.is_grad_enabled() and not hidden_states.requires_grad:
            hidden_states = hidden_states.detach().requires_grad_()
        result: tuple[torch.Tensor, Any] = super().forward(hidden_states, *args, **kwargs)
        return result
