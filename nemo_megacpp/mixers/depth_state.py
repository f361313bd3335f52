"""The layer of an R block that takes a state from the R block before it, and hands one on.

The state does not pass through the layers in between, nor through the residual stream: the stack
carries it beside the hidden states, and over pipeline cuts (:mod:`nemo_megacpp.specs.payload`).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_layer import MambaLayer

from nemo_megacpp.core.layers import residual_of


class DepthStateLayer(MambaLayer):
    """Megatron's ``MambaLayer`` around an R mixer with ``depth_state``; parameters and keys are
    those of ``MambaLayer``."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        depth_state: torch.Tensor | None = None,
        *,
        hands_on: bool,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer on ``[s, b, h]`` (the rank's share of ``s`` under SP and CP).

        Args:
            hidden_states: the input.
            depth_state: ``[s, b, V]`` of the R block before this one; None for the first.
            hands_on: whether an R block follows, here or on a later stage.
            inference_context: holds the states of the rows' sequences.
            packed_seq_params: the documents of the row.

        Returns:
            The hidden states, and the state for the next R block or None.
        """
        residual = residual_of(self, hidden_states)
        normed = self.norm(hidden_states.to(dtype=self.config.params_dtype))
        output, depth_state = self.mixer(
            normed,
            depth_state,
            hands_on=hands_on,
            inference_context=inference_context,
            packed_seq_params=packed_seq_params,
        )
        add = self.mamba_bda(training=self.training, fused=self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return add((output, None), residual, self.hidden_dropout), depth_state
