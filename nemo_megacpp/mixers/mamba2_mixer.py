"""The M mixer in mode ``nemo_native``: Megatron's own ``MambaMixer`` (Mamba-2)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_mixer import MambaMixer

from nemo_megacpp.mixers.float32 import KeepsFloat32, keep_in_float32
from nemo_megacpp.mixers.parameter_gather import wait_for_parameters
from nemo_megacpp.mixers.recompute import recomputable


class Mamba2Mixer(KeepsFloat32, MambaMixer):
    """Megatron's ``MambaMixer``, with ``A_log``, ``dt_bias`` and ``D`` in float32 and correct under
    ``overlap_param_gather``.

    Megatron builds ``A_log`` and ``D`` in float32, and its ``Float16Module`` converts them to
    bfloat16; the kernels take all three in float32. The stock mixer reads the weight and bias of
    ``conv1d`` without calling it, so nothing waits for their gather. Everything else, and every
    checkpoint key, is the stock mixer's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for parameter in (self.A_log, self.dt_bias, self.D):
            keep_in_float32(parameter, self.config)

    @recomputable("mamba")
    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return super().forward(hidden_states, *args, **kwargs)

    def _ssm_training(
        self, zxBCdt: torch.Tensor, packed_seq_params: PackedSeqParams | None = None
    ) -> torch.Tensor:
        wait_for_parameters(self.conv1d)
        return super()._ssm_training(zxBCdt, packed_seq_params)
