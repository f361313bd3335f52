"""`verify` names a fault: the check, the parameter, the first module, and the axis."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nemo_megacpp.commands.verify import verify_recipe
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.case_runner import CaseResult, CaseRunner
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.verification import verify_layout
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.views import shape_of
from nemo_megacpp.runtime.workers import WorkerPool
from tests.path import PATH
from tests.proof.faults import BrokenRanks


def _first_that_fails(
    ranks: WorkerPool, fault: str, pattern: str, layout: str, check: str
) -> CaseResult:
    """Return the first case that fails by ``check``: experts with dense tags cannot be resumed with
    expert ones either, which an axis that keeps their numbers shows before."""
    recipe, place = resolve("nam56r_tiny"), ParallelLayout.parse(layout)
    training = dataclasses.replace(recipe.training, micro_batch_size=1, global_batch_size=2)
    cases = verify_layout(
        tiny_model(pattern, num_layers=1),
        place,
        lambda model: shape_of(dataclasses.replace(recipe, model=dict(model), training=training)),
        PATH,
        pool=BrokenRanks(ranks, fault),
    )
    return next(
        case for case in cases if case.diagnosis is not None and case.diagnosis.check == check
    )


@pytest.mark.parametrize(
    ("fault", "pattern", "layout", "check", "parameter", "kind", "module", "axis"),
    [
        (
            "expert weights tagged as dense",
            "E",
            "tp=2,etp=1",
            "tags",
            "decoder.layers.0.mlp.experts",
            "parameter gradient",
            "decoder.layers.0.mlp.experts",
            "ETP alone",
        ),
        (
            "gradient of replicated rows not summed",
            "R",
            "tp=2",
            "gradients",
            "decoder.layers.0.mixer.in_proj.shared_weight",
            "parameter gradient",
            "decoder.layers.0.mixer.in_proj",
            "TP alone",
        ),
        (
            "zigzag not undone",
            "R",
            "cp=2",
            "forward",
            "",
            "output",
            "decoder.layers.0.mixer.out_proj:core",
            "CP alone",
        ),
        (
            "two heads swapped",
            "R",
            "tp=2",
            "forward",
            "",
            "output",
            "decoder.layers.0.mixer.out_proj:core",
            "TP alone",
        ),
        pytest.param(
            "zigzag not undone under TP",
            "R",
            "tp=2,cp=2",
            "forward",
            "",
            "output",
            "decoder.layers.0.mixer.out_proj:core",
            "TP with CP (fewer axes agree)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_fault_is_located(
    ranks: WorkerPool,
    fault: str,
    pattern: str,
    layout: str,
    check: str,
    parameter: str,
    kind: str,
    module: str,
    axis: str,
) -> None:
    diagnosis = _first_that_fails(ranks, fault, pattern, layout, check).diagnosis
    assert diagnosis is not None and diagnosis.first is not None
    assert diagnosis.check == check
    assert parameter in diagnosis.parameter
    assert (diagnosis.first.kind, diagnosis.axis) == (kind, axis)
    assert diagnosis.first.module.startswith(module)
    assert (diagnosis.first.layer, diagnosis.first.family) == (1, pattern)
    assert diagnosis.first.expected != diagnosis.first.found


@pytest.mark.slow
def test_bfloat16_tells_a_fault_from_rounding(ranks: WorkerPool, tmp_path: Path) -> None:
    """A correct layout stays within its estimated rounding; one missing sum does not."""
    layout = ParallelLayout.parse("tp=2,cp=2,etp=1")
    fields = tiny_model("AMER", num_layers=4)
    good = CaseRunner(ranks, PATH, tmp_path, fields).run("all", "together", layout, "bfloat16")
    assert good.passed, good
    grads = next(check for check in good.checks if check.name == "gradients")
    assert grads.rounding is not None and 1e-4 < grads.difference < grads.tolerance < 1.0

    broken = BrokenRanks(ranks, "gradient of replicated rows not summed")
    bad = CaseRunner(broken, PATH, tmp_path, fields).run("all", "together", layout, "bfloat16")
    assert bad.diagnosis is not None and bad.diagnosis.first is not None
    assert bad.diagnosis.check == "gradients"
    assert bad.diagnosis.parameter == "decoder.layers.3.mixer.in_proj.shared_weight"
    assert bad.diagnosis.first.kind == "parameter gradient"
    assert bad.diagnosis.first.rounding is not None
    assert (
        bad.diagnosis.first.difference
        > bad.diagnosis.first.tolerance
        > bad.diagnosis.first.rounding
    )


@pytest.mark.slow
def test_command_says_it(ranks: WorkerPool, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["pattern=R", "num_layers=1"]
    pool = BrokenRanks(ranks, "gradient of replicated rows not summed")
    assert (
        verify_recipe(resolve("nam56r_tiny", overrides, "tp=2,etp=none"), as_json=False, pool=pool)
        == 1
    )
    text = capsys.readouterr().out
    assert "ranks on the CPU (gloo)" in text
    for case in ("tp=2,sp=true,etp=2 (f64)", "tp=2,sp=true (f32)", "tp=2,sp=true (bf16)"):
        assert f"all in {case}: gradients differ by" in text
    assert "parameter: decoder.layers.0.mixer.in_proj.shared_weight" in text
    assert "first: the parameter gradient of decoder.layers.0.mixer.in_proj (R, layer 1)" in text
    assert "axis: TP alone" in text
    assert "all checks passed" not in text
