"""Every norm has the configuration's epsilon, on a backend whose norms have another by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.norm import TorchRMSNorm
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import fake_rank
from nemo_megacpp.specs.backend import TorchBackend
from nemo_megacpp.specs.hybrid_model import build_hybrid_model
from tests.bare import make_config

EPSILON = 3e-3


class _Norm(TorchRMSNorm):
    """With the default of Megatron's ``TENorm``, which does not read the configuration."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(config, hidden_size, eps)


class _Backend(TorchBackend):
    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return _Norm


@pytest.mark.parametrize(
    ("mode", "of_m"), [("nemo_native", "mixer.in_proj"), ("mamba3", "norm")], ids=["m2", "m3"]
)
def test_epsilon(mode: str, of_m: str) -> None:
    model = tiny_model("AEMR", mode=mode, layernorm_epsilon=EPSILON)
    config = make_config(StepSpec(model), ParallelLayout())
    with fake_rank(ParallelLayout(), 0), torch.device("meta"):
        built: Any = build_hybrid_model(config, backend=_Backend())
    norms = {name: module for name, module in built.named_modules() if isinstance(module, _Norm)}
    separate = {"layers.1.pre_mlp_layernorm", "layers.3.norm", "final_norm"}
    fused = {"layers.0.self_attention.linear_qkv", f"layers.2.{of_m}"}
    if mode == "mamba3":  # its norm feeds split and shared rows, so it is a module of its own
        separate, fused = separate | {f"layers.2.{of_m}"}, fused - {f"layers.2.{of_m}"}
    assert norms.keys() == {f"decoder.{name}" for name in separate}
    assert {module.eps for module in norms.values()} == {EPSILON}
    # As Transformer Engine's fused modules do, ours read the configuration that they are given.
    found = {n for n, _ in built.named_parameters() if n.endswith("layer_norm_weight")}
    assert found == {f"decoder.{name}.layer_norm_weight" for name in fused}
    for name in fused:
        assert built.get_submodule(f"decoder.{name}").config.layernorm_epsilon == EPSILON
