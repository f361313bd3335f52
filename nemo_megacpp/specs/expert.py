"""E: a mixture of experts with a shared expert, and an expert-tensor-parallel degree of its own."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from nemo_megacpp.mixers.router import CapacityRouter
from nemo_megacpp.mixers.shared_experts import SharedExpert

_ANY_NUMBER = 1  # Megatron's helper only checks that there are experts; the config counts them.


def expert_layer_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """Return Megatron's ``TransformerLayer`` with ``MoELayer`` only.

    The experts come from the backend, which tags their weights for the expert groups
    (:mod:`nemo_megacpp.mixers.experts`); the router drops tokens over a whole microbatch where a
    capacity is set (:mod:`nemo_megacpp.mixers.router`); the shared expert is right with
    ``overlap_param_gather`` (:mod:`nemo_megacpp.mixers.shared_experts`).
    """
    moe = get_moe_module_spec_for_backend(backend, num_experts=_ANY_NUMBER, moe_grouped_gemm=True)
    moe.submodules.router = CapacityRouter
    moe.submodules.shared_experts.module = SharedExpert
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=backend.layer_norm(rms_norm=True),
            mlp=moe,
            mlp_bda=get_bias_dropout_add,
        ),
    )
