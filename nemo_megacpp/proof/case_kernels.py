"""Which kernels a case runs in, by device and dtype.

On GPUs the kernels that training uses (Transformer Engine, mamba_ssm, Triton) are proved in
bfloat16, their dtype. causal_conv1d and Transformer Engine have no float64, and TF32 is coarser
than the limits of float32: there the same model runs in plain torch, on the GPU, with TF32 off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from megatron.core.models.backends import BackendSpecProvider

from nemo_megacpp.proof.step_spec import Dtype
from nemo_megacpp.runtime.host import current_host
from nemo_megacpp.runtime.torch_forms import use_torch_forms
from nemo_megacpp.runtime.workers import Device
from nemo_megacpp.specs.backend import TorchBackend, default_backend

KernelsName = Literal["torch", "default"]

_NARROW: Mapping[str, int] = MappingProxyType(
    {
        "hidden_size": 64,
        "kv_channels": 4,
        "mamba_head_dim": 4,
        "mamba_state_dim": 8,
        "m2rnn_key_head_dim": 8,
        "m2rnn_value_head_dim": 2,
    }
)
# mamba_ssm's convolution takes multiples of 8 channels a rank, its and our Triton kernels tiles of
# 16 and powers of two, flash attention multiples of 8 a head.
_TILE = 16
_NARROW_FOR_KERNELS: Mapping[str, int] = MappingProxyType(
    {name: max(width, _TILE) for name, width in _NARROW.items()}
)

_FUSIONS_OFF: Mapping[str, Any] = MappingProxyType(
    {
        "apply_rope_fusion": False,
        "fused_single_qkv_rope": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "cross_entropy_loss_fusion": False,
        "moe_permute_fusion": False,
        "moe_router_fusion": False,
        "use_te_activation_func": False,
        "fp8": None,
        "fp4": None,
    }
)
"""Settings that select a kernel, and their values without one."""


@dataclass(frozen=True)
class Kernels:
    """What a case runs in.

    Attributes:
        name: ``torch`` for plain torch forms with TF32 off, ``default`` for those that training
            uses on this machine.
        narrowest: the widths to which a proxy model may be narrowed, by field of ``HybridConfig``.
    """

    name: KernelsName
    narrowest: Mapping[str, int]

    def fields(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a ``HybridConfig`` with the settings that these kernels have."""
        if self.name == "default":
            return dict(model)
        changed = {name: value for name, value in _FUSIONS_OFF.items() if name in model}
        changed["m2rnn_kernel"] = "torch"
        if model.get("mode") == "mamba3":
            changed["mamba3_kernel"] = "torch"
        return {**model, **changed}


def kernels_for(device: Device, dtype: Dtype) -> Kernels:
    """Return the kernels of a case whose ranks are on ``device``: on the CPU always plain torch."""
    if device == "cpu":
        return Kernels("torch", _NARROW)
    return Kernels("default" if dtype == "bfloat16" else "torch", _NARROW_FOR_KERNELS)


def kernels_here(dtype: Dtype) -> Kernels:
    """Return the kernels of this rank's case."""
    return kernels_for(current_host().device, dtype)


def use_kernels(dtype: torch.dtype) -> BackendSpecProvider:
    """Install the kernels of this rank's case for the rest of its process, and return the backend
    that goes with them."""
    if kernels_here("bfloat16" if dtype == torch.bfloat16 else "float32").name == "default":
        return default_backend()
    use_torch_forms()
    return TorchBackend()
