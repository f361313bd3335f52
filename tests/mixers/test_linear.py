"""The input projections of our mixers against one product, and the alignment of their outputs."""

from __future__ import annotations

import pytest
import torch

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.linear import SharedColumnParallelLinear
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import make_config


def _worst_and_strides(rows: int, shared: int) -> tuple[float, list[int]]:
    """Return the largest difference from ``x Wᵀ``, forward and gradients, and both row strides."""
    layout = ParallelLayout.parse("tp=1")
    start_model_parallel(layout)
    config = make_config(StepSpec(tiny_model("R"), dtype="float64"), layout)
    linear = SharedColumnParallelLinear(
        12,
        rows,
        shared,
        config=config,
        init_method=torch.nn.init.normal_,
        gather_output=False,
        bias=False,
        skip_bias_add=False,
        is_expert=False,
    )
    x = torch.randn(5, 3, 12, dtype=torch.float64, requires_grad=True)
    outputs = linear(x)
    weights = [w.detach().requires_grad_() for w in (linear.shared_weight, linear.weight)]
    x_expected = x.detach().requires_grad_()
    expected = [torch.einsum("sbh,oh->sbo", x_expected, weight) for weight in weights]
    for out in (outputs, expected):
        sum((t * torch.arange(t.numel()).view_as(t).sin()).sum() for t in out).backward()
    pairs = [
        *zip(outputs, expected, strict=True),
        (x.grad, x_expected.grad),
        (linear.shared_weight.grad, weights[0].grad),
        (linear.weight.grad, weights[1].grad),
    ]
    strides = [t.stride(1) for t in outputs]
    return max((a - b).abs().max().item() for a, b in pairs), strides


@pytest.mark.parametrize(("rows", "shared"), [(1031 - 32, 32), (7, 2), (8, 8), (5, 6)])
def test_outputs_are_those_of_one_product_and_begin_at_multiples_of_eight(
    ranks: WorkerPool, rows: int, shared: int
) -> None:
    ((worst, strides),) = ranks.run(1, _worst_and_strides, rows, shared)
    assert worst < 1e-12
    assert strides == [rows + shared + -(rows + shared) % 8] * 2
