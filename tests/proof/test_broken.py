"""The proof sees what it is there to see: faults made on purpose, named by check and parameter."""

from __future__ import annotations

import pytest

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.checks import FLOAT64, Check, compare
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.path import run_step
from tests.proof.faults import run_broken
from tests.reference import Reference


@pytest.mark.parametrize(
    ("fault", "pattern", "layout", "check", "where"),
    [
        ("expert weights tagged as dense", "E", "tp=2,etp=1", "tags", "mlp.experts"),
        ("replicated rows tagged as split", "R", "tp=2", "tags", "shared_weight"),
        ("gradient of replicated rows not summed", "R", "tp=2", "gradients", "shared_weight"),
        ("zigzag not undone", "R", "cp=2", "forward", ""),
        ("two heads swapped", "R", "tp=2", "forward", ""),
        pytest.param(
            *("gradient of a block in the ring not summed", "A", "cp=2", "gradients", "linear_qkv"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_fault_is_named(
    ranks: WorkerPool,
    reference: Reference,
    fault: str,
    pattern: str,
    layout: str,
    check: str,
    where: str,
) -> None:
    spec = StepSpec(tiny_model(pattern), objective="logits", dtype="float64")
    weights, expected = reference(spec)
    place = ParallelLayout.parse(layout)
    result = ranks.run(place.world, run_broken, fault, run_step, spec, place, weights)[0]
    broken: list[Check] = [r for r in compare(expected, result, FLOAT64) if not r.passed]
    assert broken, f"{fault}: not seen"
    assert broken[0].name == check
    assert where in broken[0].where


def test_starved_experts(ranks: WorkerPool, reference: Reference) -> None:
    """Experts, and a whole expert-parallel rank, that no token reaches."""
    spec = StepSpec(
        tiny_model("AEMR"), objective="logits", dtype="float64", starved_experts=(0, 1, 5)
    )
    weights, expected = reference(spec)
    dead = [
        key
        for key, value in expected.gradients.values.items()
        if "experts.experts" in key and not value[[0, 1, 5]].any() and value[[2, 3, 4, 6, 7]].any()
    ]
    assert dead, "the starved experts' gradients must be zero, the others' not"
    for text in ("ep=4", "tp=2,etp=1", "tp=2,ep=2,etp=2", "ep=2,pp=2"):
        layout = ParallelLayout.parse(text)
        result = ranks.run(layout.world, run_step, spec, layout, weights)[0]
        assert all(check.passed for check in compare(expected, result, FLOAT64)), text


def test_bound_state_gradient_binds_alike(ranks: WorkerPool, reference: Reference) -> None:
    """With a bound low enough to act everywhere, the R block's gradients still do not depend on
    how many ranks share the batch or the sequence."""
    spec = StepSpec(
        tiny_model("R", m2rnn_state_gradient_clip=1e-6), objective="logits", dtype="float64"
    )
    free = StepSpec(
        tiny_model("R", m2rnn_state_gradient_clip=None), objective="logits", dtype="float64"
    )
    weights, expected = reference(spec)
    _, unbound = reference(free)
    assert not all(check.passed for check in compare(unbound, expected, FLOAT64))
    for text in ("cp=2", "cp=4", "tp=2,cp=2", "world=2", "world=4", "world=4,tp=2"):
        layout = ParallelLayout.parse(text)
        result = ranks.run(layout.world, run_step, spec, layout, weights)[0]
        assert all(check.passed for check in compare(expected, result, FLOAT64)), text
