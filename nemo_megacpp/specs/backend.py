"""The backend: Transformer Engine where it is installed, plain torch elsewhere.

This is the only file that asks whether Transformer Engine is there.
"""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_megacpp.core.moe import experts_of, replace_experts
from nemo_megacpp.mixers.core_attention import TorchCoreAttention
from nemo_megacpp.mixers.experts import with_expert_tags
from nemo_megacpp.mixers.linear import NormColumnParallelLinear
from nemo_megacpp.mixers.norm import NormOfConfig, TorchRMSNorm


class TorchBackend(BackendSpecProvider):
    """Plain torch modules, under Transformer Engine's parameter names."""

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormColumnParallelLinear

    def layer_norm(  # type: ignore[override]
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type:
        return TorchRMSNorm

    def core_attention(self) -> type:
        return TorchCoreAttention

    def grouped_mlp_modules(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return experts_of(with_expert_tags(SequentialMLP), submodules)

    def activation_func(self) -> type | None:  # type: ignore[override]
        return None


class TransformerEngineBackend(TESpecProvider):
    """Megatron's Transformer Engine modules, with expert weights tagged for their own groups."""

    def grouped_mlp_modules(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return replace_experts(super().grouped_mlp_modules(*args, **kwargs), with_expert_tags)


def default_backend() -> BackendSpecProvider:
    """Return the backend of this installation."""
    return TransformerEngineBackend() if HAVE_TE else TorchBackend()


def mamba_layer(mixer: ModuleSpec, backend: BackendSpecProvider | None = None) -> ModuleSpec:
    """Return Megatron's ``MambaLayer`` (norm, mixer, residual) around ``mixer``.

    Args:
        mixer: a mixer from ``[s, b, h]`` to ``[s, b, h]``.
        backend: of the norm; None if the mixer has a norm fused into its input projection.
    """
    norm = {}
    if backend is not None:
        params = {"norm": backend.layer_norm(rms_norm=True)}
        norm = {"norm": ModuleSpec(module=NormOfConfig, params=params)}
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(mixer=mixer, mamba_bda=get_bias_dropout_add, **norm),
    )
