"""R: the M²RNN mixer inside Megatron's own ``MambaLayer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_megacpp.config import NO_SETTINGS
from nemo_megacpp.mixers.linear import SharedColumnParallelLinear
from nemo_megacpp.mixers.m2rnn import M2RNNMixer, M2RNNMixerSubmodules
from nemo_megacpp.specs.backend import mamba_layer_norm


def recurrent_layer_spec(
    backend: BackendSpecProvider, settings: Mapping[str, Any] = NO_SETTINGS
) -> ModuleSpec:
    """Return a ``MambaLayer`` around :class:`nemo_megacpp.mixers.m2rnn.M2RNNMixer`.

    The norm is a module of its own here: its output feeds split and shared rows alike.

    Args:
        backend: where the modules come from.
        settings: the mixer's, for a plain configuration.
    """
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=mamba_layer_norm(backend),
            mixer=ModuleSpec(
                module=M2RNNMixer,
                params={"settings": dict(settings)},
                submodules=M2RNNMixerSubmodules(
                    in_proj=SharedColumnParallelLinear, out_proj=backend.row_parallel_linear()
                ),
            ),
            mamba_bda=get_bias_dropout_add,
        ),
    )
