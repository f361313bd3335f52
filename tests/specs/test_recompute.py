"""Activations that are computed again in the backward pass give the same step."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.nemo.proof_run import run_step
from nemo_megacpp.proof.checks import FLOAT64, compare
from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_result import StepResult
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool

EVERY_KIND = ("layernorm", "core_attn", "shared_experts", "moe")


def _spec(*modules: str) -> StepSpec:
    again: dict[str, Any] = {
        "recompute_granularity": "selective",
        "recompute_modules": list(modules),
    }
    model = tiny_model("AE", **(again if modules else {}))
    return StepSpec(model, objective="logits", dtype="float64", global_batch_size=2)


def _step(
    spec: StepSpec, layout: ParallelLayout, weights: GlobalValues | None = None
) -> tuple[StepResult | None, int]:
    """Return a step, and how often the norm before the experts ran in it."""
    from nemo_megacpp.mixers.norm import TorchRMSNorm

    runs = [0]
    stock = TorchRMSNorm.forward

    def counted(self: TorchRMSNorm, x: Any) -> Any:
        runs[0] += 1
        return stock(self, x)

    TorchRMSNorm.forward = counted  # type: ignore[method-assign]
    return run_step(spec, layout, weights), runs[0]


@pytest.fixture(scope="module")
def plain(ranks: WorkerPool) -> tuple[StepResult, int]:
    """Return a step on one rank without recomputation, and its count of norms."""
    return ranks.run(1, _step, _spec(), ParallelLayout())[0]


@pytest.mark.parametrize(
    ("modules", "layout"),
    [
        (("layernorm",), "tp=1"),
        (("layernorm",), "tp=2,cp=2,etp=1"),
        (EVERY_KIND, "tp=2,ep=2,etp=1"),
    ],
    ids=["layernorm", "layernorm-tp-cp", "all-tp-ep"],
)
def test_recomputed_modules_give_the_same_step(
    ranks: WorkerPool, plain: tuple[StepResult, int], modules: tuple[str, ...], layout: str
) -> None:
    expected, norms = plain
    where = ParallelLayout.parse(layout)
    result, norms_again = ranks.run(where.world, _step, _spec(*modules), where, expected.initial)[0]
    broken = [check for check in compare(expected, result, FLOAT64) if not check.passed]
    assert not broken, broken
    # Of two norms a microbatch, the one before the experts runs twice.
    assert norms_again == norms * 3 // 2
