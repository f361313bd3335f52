"""The M mixer in mode ``nemo_native``: Megatron's own ``MambaMixer`` (Mamba-2)."""

from __future__ import annotations

from typing import Any

from megatron.core.ssm.mamba_mixer import MambaMixer

from nemo_megacpp.mixers.float32 import KeepsFloat32, keep_in_float32


class Mamba2Mixer(KeepsFloat32, MambaMixer):
    """Megatron's ``MambaMixer``, whose ``A_log``, ``dt_bias`` and ``D`` stay float32.

    Megatron builds ``A_log`` and ``D`` in float32 for good reason, and its ``Float16Module`` makes
    them bfloat16 again. The kernels take all three in float32.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for parameter in (self.A_log, self.dt_bias, self.D):
            keep_in_float32(parameter, self.config)
