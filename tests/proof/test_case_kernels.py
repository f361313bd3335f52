"""Which kernels a case runs in, and a proxy model that they take. No GPU has run them yet."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixer_settings import Mamba3Settings
from nemo_megacpp.mixers.kernels.m2rnn_triton import unfit_for_triton
from nemo_megacpp.proof.case_kernels import kernels_for
from nemo_megacpp.proof.small_models import proxy_model, tiny_model
from nemo_megacpp.recipes.catalog import CATALOG
from nemo_megacpp.recipes.recipe import resolve

_GPU = kernels_for("cuda", "bfloat16")


def test_the_choice() -> None:
    names = {
        (device, dtype): kernels_for(device, dtype).name
        for device in ("cpu", "cuda")
        for dtype in ("float64", "float32", "bfloat16")
    }
    assert names.pop(("cuda", "bfloat16")) == "default"
    assert set(names.values()) == {"torch"}
    assert kernels_for("cuda", "float64").narrowest == _GPU.narrowest, "one proxy model for all"


def test_settings_that_ask_for_a_kernel() -> None:
    asked = {
        "m2rnn_kernel": "triton",
        "mamba3_kernel": "triton",
        "mode": "mamba3",
        "moe_permute_fusion": True,
        "fp8": "hybrid",
    }
    model = tiny_model("AEMR", **asked)
    assert _GPU.fields(model) == model
    plain = kernels_for("cuda", "float32").fields(model)
    assert {name: plain[name] for name in asked} == {
        "m2rnn_kernel": "torch",
        "mamba3_kernel": "torch",
        "mode": "mamba3",
        "moe_permute_fusion": False,
        "fp8": None,
    }
    untouched = model.keys() - asked.keys()
    assert all(plain[name] == model[name] for name in untouched)
    # 'auto' would take Triton in float32 on a GPU.
    assert kernels_for("cuda", "float32").fields(tiny_model("R"))["m2rnn_kernel"] == "torch"
    HybridConfig(**kernels_for("cpu", "float64").fields(tiny_model("MR")))


@pytest.mark.parametrize("name", CATALOG)
@pytest.mark.parametrize("text", ["tp=1", "tp=2,cp=2", "tp=4"])
def test_a_proxy_model_has_widths_that_kernels_take(name: str, text: str) -> None:
    recipe, layout = resolve(name), ParallelLayout.parse(text)
    small = proxy_model(recipe.model, layout, _GPU.narrowest)
    for width in ("kv_channels", "mamba_head_dim", "mamba_state_dim", "m2rnn_key_head_dim"):
        assert small[width] == min(recipe.model[width], 16), width
        assert small[width] % 8 == 0 and math.log2(small[width]).is_integer(), width
    # mamba_ssm's convolution, on the channels of x, B and C that a rank has.
    heads, groups = small["mamba_num_heads"], small["mamba_num_groups"]
    channels = heads * small["mamba_head_dim"] + 2 * groups * small["mamba_state_dim"]
    assert channels // (layout.tp * layout.cp) % 8 == 0
    assert unfit_for_triton(small["m2rnn_value_head_dim"], torch.bfloat16) is None
    if small.get("mode") == "mamba3":
        config = HybridConfig(**small)
        assert Mamba3Settings.of(config).dimensions(config).num_angles % 2 == 0


@pytest.mark.processes
def test_torch_forms_take_every_kernels_place() -> None:
    """In a process of its own, where other kernels stand in for those of a GPU."""
    code = """
from unittest import mock
import megatron.core.optimizer as package
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.ssm import mamba_context_parallel, mamba_mixer
from megatron.core.transformer.moe import moe_utils
import torch
kernel = mock.Mock(name="kernel")
names = {
    mamba_mixer: ["RMSNormGated", "ExtendedRMSNorm", "mamba_split_conv1d_scan_combined",
                  "mamba_chunk_scan_combined"],
    mamba_context_parallel: ["tex"],
    moe_utils: ["te_general_gemm"],
    package: ["Adam", "SGD"],
    clip_grads: ["l2_norm_impl", "multi_tensor_applier", "multi_tensor_scale_impl",
                 "clip_grad_by_total_norm_fp32"],
    optimizer: ["multi_tensor_applier", "multi_tensor_scale_impl", "clip_grad_by_total_norm_fp32"],
}
for module, attributes in names.items():
    for attribute in attributes:
        setattr(module, attribute, kernel)
package.USING_PYTORCH_OPTIMIZER = False
torch.set_float32_matmul_precision("high")
torch.backends.cudnn.allow_tf32 = True
from nemo_megacpp.runtime.torch_forms import use_torch_forms
use_torch_forms()
left = [(module.__name__, attribute) for module, attributes in names.items()
        for attribute in attributes if getattr(module, attribute) is kernel]
assert not left, left
assert package.USING_PYTORCH_OPTIMIZER and package.Adam is torch.optim.AdamW
assert torch.get_float32_matmul_precision() == "highest"
assert not torch.backends.cudnn.allow_tf32
gradient = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
gradient.grad = torch.full((2,), 3.0, dtype=torch.float64)
optimizer.clip_grad_by_total_norm_fp32([gradient], max_norm=1.0, total_norm=2.0)
assert gradient.grad.dtype == torch.float64 and abs(gradient.grad[0] - 1.5) < 1e-5
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
