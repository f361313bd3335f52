"""The proof takes the path that trains, and sees what goes wrong on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.nemo.loss import HybridLossReduction
from nemo_megacpp.nemo.proof_run import run_step
from nemo_megacpp.proof.checks import FLOAT64, compare
from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_result import StepResult
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.reference import Reference


class _NemosReduction(HybridLossReduction):
    """NeMo's mean: over the unmasked tokens of one context-parallel rank."""

    def forward(self, batch: Any, forward_out: torch.Tensor) -> Any:
        total, tokens, _ = MaskedTokenLossReduction.forward(self, batch, forward_out)
        record = torch.stack([total.detach().double(), tokens.double()])
        return total, tokens, {"loss_sum_and_ub_size": record}


BROKEN: dict[str, tuple[str, Any]] = {
    "the mean of a rank": ("nemo_megacpp.nemo.hybrid_gpt.HybridLossReduction", _NemosReduction),
    "auxiliary losses of a rank": (
        "nemo_megacpp.mixers.experts._scale_auxiliary_losses",
        lambda config, shares: None,
    ),
}


def _broken_step(
    what: str, spec: StepSpec, layout: ParallelLayout, weights: GlobalValues
) -> StepResult | None:
    with mock.patch(*BROKEN[what]):
        return run_step(spec, layout, weights)


@pytest.mark.parametrize(
    ("what", "model", "fields", "layout"),
    [
        (
            "the mean of a rank",
            tiny_model("AMR", mode="mamba3", seq_length=32),
            {"documents": (16, 4, 12)},
            "cp=2",
        ),
        ("the mean of a rank", tiny_model("A"), {"loss_mask": "uneven"}, "cp=2"),
        (
            "auxiliary losses of a rank",
            tiny_model("E", calculate_per_token_loss=True),
            {},
            "tp=2,etp=1",
        ),
        (
            "auxiliary losses of a rank",
            tiny_model(
                "E",
                calculate_per_token_loss=True,
                moe_router_load_balancing_type="none",
                moe_z_loss_coeff=1e-2,
            ),
            {},
            "cp=2",
        ),
    ],
    ids=["packs", "mask", "balancing", "z"],
)
def test_what_the_stock_path_does_is_seen(
    ranks: WorkerPool,
    reference: Reference,
    what: str,
    model: dict[str, Any],
    fields: dict[str, Any],
    layout: str,
) -> None:
    spec = StepSpec(model, objective="logits", dtype="float64", **fields)
    weights, expected = reference(spec)
    place = ParallelLayout.parse(layout)
    result = ranks.run(place.world, _broken_step, what, spec, place, weights)[0]
    broken = {check.name: check for check in compare(expected, result, FLOAT64) if not check.passed}
    assert broken["gradients"].difference > 1e-3
    result = ranks.run(place.world, run_step, spec, place, weights)[0]
    assert all(check.passed for check in compare(expected, result, FLOAT64))


NOT_SHARED = (
    "the rows",
    "the initial weights",
    "the objective in float64",
    "precision in float64",
    "adam_eps",
    "kernels in float64 and float32 on GPUs",
    "loggers, progress and validation",
)
"""What :func:`nemo_megacpp.nemo.proof_run.run_step` does not share with a run."""


def test_what_is_not_shared_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")
    for what in NOT_SHARED:
        assert f"| {what} |" in page, what
