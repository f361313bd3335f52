"""The Mamba-2 mixer: Megatron's own ``MambaMixer``."""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_mixer import MambaMixer

from nemo_megacpp.mixers.parameter_gather import wait_for_parameters


class Mamba2Mixer(MambaMixer):
    """Megatron's ``MambaMixer``, right with ``overlap_param_gather`` too.

    The stock mixer reads the weight and bias of ``conv1d`` and never calls it, so nothing waits
    until they are gathered. Everything else, and every checkpoint key, is the stock mixer's.
    """

    def _ssm_training(
        self, zxBCdt: torch.Tensor, packed_seq_params: PackedSeqParams | None = None
    ) -> torch.Tensor:
        wait_for_parameters(self.conv1d)
        return super()._ssm_training(zxBCdt, packed_seq_params)
