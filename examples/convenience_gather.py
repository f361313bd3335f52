"""A defect to look at: the short convolution of ``short_conv.py``, behind a convenience gather.

The layer bounds its input on the whole sequence, because the function that does so was written for
whole sequences, and splits the result again. Each token is bounded by itself, so no rank needs the
tokens of another. The numbers are right in every layout, so ``verify`` passes; the gather costs
bytes and memory, and ``gathers`` names it::

    nemo-megacpp gathers nam56r_tiny family_modules=[examples/convenience_gather.py] pattern=W
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_megacpp.families import block_of, load_families, register
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.pattern import Family

load_families([str(Path(__file__).with_name("short_conv.py"))])
SHORT_CONV = block_of(Family("C"))
LARGEST = 100.0


class BoundedLayer(MambaLayer):
    """``MambaLayer`` with its input in ``[-LARGEST, LARGEST]``."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take and return this rank's tokens, as the stock layer does."""
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
            hidden_states = scatter_to_sequence_parallel_region(whole.clamp(-LARGEST, LARGEST))
        else:
            hidden_states = hidden_states.clamp(-LARGEST, LARGEST)
        return super().forward(hidden_states, *args, **kwargs)


def bounded_layer_spec(backend: BackendSpecProvider, fields: HybridFields) -> ModuleSpec:
    """Return the short convolution's layer spec around :class:`BoundedLayer`."""
    return replace(SHORT_CONV.layer_spec(backend, fields), module=BoundedLayer)


register(
    replace(
        SHORT_CONV, letter="W", name="short convolution, gathered", layer_spec=bounded_layer_spec
    )
)
