"""The shared expert of an E block: Megatron's own ``SharedExpertMLP``."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from nemo_megacpp.mixers.parameter_gather import wait_for_parameters


class SharedExpert(SharedExpertMLP):
    """Megatron's ``SharedExpertMLP``, right with ``overlap_param_gather`` too.

    With ``moe_shared_expert_overlap`` the token dispatcher calls the shared expert piece by piece
    and never its ``forward``, so nothing waits until the weight of its gate is gathered.
    """

    def pre_forward_comm(self, input: torch.Tensor) -> None:
        """Gather the input over tp, and compute the gate; see Megatron's."""
        wait_for_parameters(self)
        super().pre_forward_comm(input)
