"""Multi-token prediction: the same loss, gradients and step in every layout."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from nemo_megacpp.core.multi_token import DepthShare, depth_shares, missing_prediction
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.checks import FLOAT32, FLOAT64, Limits, compare
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.path import run_step
from tests.reference import Reference
from tests.selection import slow_if

pytestmark = pytest.mark.skipif(missing_prediction() is not None, reason=str(missing_prediction()))

ALL = tiny_model("AEMR/EAFMR/EAFMR", mtp_loss_scaling_factor=0.7)
MAMBA3 = tiny_model("AM/MR", mode="mamba3", seq_length=32, mtp_loss_scaling_factor=0.7)
CUTS = tiny_model("A|M|R|F/RE", mtp_loss_scaling_factor=0.7, moe_z_loss_coeff=1e-3)
PER_TOKEN = {"calculate_per_token_loss": True, "m2rnn_state_gradient_clip": None}
PACKS = {"documents": (16, 4, 12), "loss_mask": "uneven"}


def _spec(model: dict[str, Any], **changes: Any) -> StepSpec:
    return StepSpec(model, **{"objective": "logits", "dtype": "float64", **changes})


def _broken(ranks: WorkerPool, reference: Reference, spec: StepSpec, text: str) -> list[Any]:
    layout, (weights, expected) = ParallelLayout.parse(text), reference(spec)
    result = ranks.run(layout.world, run_step, spec, layout, weights)[0]
    within: Limits = FLOAT64 if spec.dtype == "float64" else FLOAT32
    return [check for check in compare(expected, result, within) if not check.passed]


CASES: tuple[tuple[str, StepSpec, tuple[str, ...]], ...] = (
    (
        "all",
        _spec(ALL),
        ("tp=2,etp=1", "cp=2", "pp=2", "ep=2", "world=2", "tp=2,pp=2", "tp=2,cp=2,ep=2,etp=1"),
    ),
    ("cuts", _spec(CUTS), ("pp=2,vpp=2", "pp=4", "tp=2,pp=2,vpp=2")),
    ("without SP", _spec(tiny_model("AR/MF")), ("tp=2,sp=false",)),
    (
        "uneven",
        _spec(ALL, loss_mask="uneven", micro_batch_size=2, global_batch_size=8),
        ("cp=2", "cp=4"),
    ),
    ("per token", _spec(ALL | PER_TOKEN, loss_mask="uneven"), ("cp=2", "world=2", "tp=2,cp=2")),
    ("mamba3 packs", _spec(MAMBA3, **PACKS), ("cp=2", "tp=2", "tp=2,cp=2")),
    ("packs per token", _spec(MAMBA3 | PER_TOKEN, **PACKS), ("cp=2",)),
)
_FAST = {
    *(("all", layout) for layout in ("tp=2,etp=1", "cp=2", "pp=2", "ep=2")),
    ("cuts", "pp=2,vpp=2"),
    ("mamba3 packs", "cp=2"),
}


@pytest.mark.parametrize(
    ("spec", "layout"),
    [
        pytest.param(
            spec, layout, id=f"{name}-{layout}", marks=slow_if((name, layout) not in _FAST)
        )
        for name, spec, layouts in CASES
        for layout in layouts
    ],
)
def test_float64(ranks: WorkerPool, reference: Reference, spec: StepSpec, layout: str) -> None:
    """Through linear forms of the logits of the model and of every depth: 1e-9."""
    assert not _broken(ranks, reference, spec, layout)


@pytest.mark.parametrize(
    "layout", [pytest.param("tp=2,pp=2", marks=slow_if(True)), "tp=2,cp=2,ep=2,etp=1"]
)
def test_float32_loss(ranks: WorkerPool, reference: Reference, layout: str) -> None:
    """Through Megatron's cross entropy, clipping and three steps of Adam, in float32: 1e-5."""
    spec = StepSpec(ALL, steps=3, learning_rate=1e-3, loss_mask="uneven")
    assert not _broken(ranks, reference, spec, layout)


def test_the_depths_are_trained(reference: Reference) -> None:
    """The parity above compares something: the depths have gradients, and change the decoder's."""
    _, trained = reference(_spec(ALL))
    _, without = reference(_spec(ALL | {"mtp_loss_scaling_factor": 0.0}))
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    assert abs(trained.gradients.values[name] - without.gradients.values[name]).max() > 1e-6
    depths = {key: abs(g).max() for key, g in trained.gradients.values.items() if "mtp." in key}
    assert len(depths) > 40 and min(depths.values()) > 0, depths
    # Compared in every layout, as the losses of the router are.
    assert {"mtp_1", "mtp_2"} < set(trained.aux_losses)


def _unweighted(*args: Any) -> list[DepthShare]:
    return [share._replace(weight=None) for share in depth_shares(*args)]


def _without_weights(*args: Any) -> Any:
    with mock.patch("nemo_megacpp.specs.hybrid_model.depth_shares", _unweighted):
        return run_step(*args)


def test_megatrons_mean_of_means_is_seen(ranks: WorkerPool, reference: Reference) -> None:
    """Without our weights the losses of the depths are averaged on each cp rank alone."""
    spec, layout = _spec(ALL), ParallelLayout.parse("cp=2")
    weights, expected = reference(spec)
    result = ranks.run(2, _without_weights, spec, layout, weights)[0]
    broken = [check for check in compare(expected, result, FLOAT64) if not check.passed]
    assert {check.name for check in broken} >= {"gradients", "step"}
