"""M in mode ``nemo_native``: Megatron's own ``MambaMixer`` (Mamba-2)."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_megacpp.mixers.mamba2 import Mamba2Mixer


def mamba_layer_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """Return Megatron's ``MambaLayer``; the norm is fused into the mixer's input projection."""
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            mixer=ModuleSpec(
                module=Mamba2Mixer,
                submodules=MambaMixerSubmodules(
                    in_proj=backend.column_parallel_layer_norm_linear(),
                    out_proj=backend.row_parallel_linear(),
                ),
            ),
            mamba_bda=get_bias_dropout_add,
        ),
    )
