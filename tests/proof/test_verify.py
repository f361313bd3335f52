"""What `verify` tries, and that it says so when a layout changes a number."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from nemo_megacpp.commands.verify import verify_recipe
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout, check_layout
from nemo_megacpp.proof.case_kernels import kernels_for
from nemo_megacpp.proof.case_report import BACKENDS, verify_document
from nemo_megacpp.proof.case_runner import CaseResult
from nemo_megacpp.proof.checks import (
    FLOAT64,
    Check,
    compare,
    parameter_difference,
    tensor_difference,
)
from nemo_megacpp.proof.diagnosis import Diagnosis, TensorDifference
from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.small_models import every_expert, one_family, proxy_model, tiny_model
from nemo_megacpp.proof.step_result import StepResult
from nemo_megacpp.proof.verification import axes_alone, axes_in_pairs, verify_layout
from nemo_megacpp.recipes.catalog import CATALOG
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.views import shape_of
from nemo_megacpp.runtime.workers import device_for
from tests.path import PATH

COUNTS = (
    "num_attention_heads",
    "num_query_groups",
    "mamba_num_heads",
    "mamba_num_groups",
    "m2rnn_num_heads",
    "num_moe_experts",
    "moe_router_topk",
)


@pytest.mark.parametrize("name", CATALOG)
@pytest.mark.parametrize("text", ["tp=2,etp=1", "tp=4,cp=2", "pp=2,ep=2", "tp=8", "tp=4,cp=4"])
def test_a_proxy_model_is_legal_where_the_recipe_is(name: str, text: str) -> None:
    recipe = resolve(name)
    layout = ParallelLayout.parse(text)
    small = proxy_model(recipe.model, layout, kernels_for("cpu", "float64").narrowest)
    assert {key: small[key] for key in COUNTS} == {key: recipe.model[key] for key in COUNTS}
    assert small["hidden_size"] <= 64

    def axes(model: Any) -> set[str]:
        sized = dataclasses.replace(recipe, model=model)
        return {violation.rule for violation in check_layout(layout, shape_of(sized))}

    batch = {"batch"}  # the recipes' batches are not the proxy model's
    assert axes(small) - batch == axes(recipe.model) - batch


def test_axes_alone() -> None:
    layout = ParallelLayout.parse("tp=2,cp=2,etp=1,ep=2,pp=2,vpp=3")
    assert [(axis, place.short()) for axis, place in axes_alone(layout)] == [
        ("TP", ParallelLayout.parse("tp=2,etp=2").short()),
        ("ETP", ParallelLayout.parse("tp=2,etp=1").short()),
        ("CP", ParallelLayout(context_parallel_size=2).short()),
        ("EP", ParallelLayout(expert_model_parallel_size=2).short()),
        ("PP", ParallelLayout(pipeline_model_parallel_size=2).short()),
        (
            "VPP",
            ParallelLayout(
                pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3
            ).short(),
        ),
    ]


def test_one_family_fills_every_chunk() -> None:
    layout = ParallelLayout.parse("pp=2,vpp=2")
    fields = one_family(tiny_model("AEMR"), "R", layout)
    assert (fields["hybrid_pattern"], fields["num_layers"]) == ("R", 4)


def test_too_many_ranks() -> None:
    layout = ParallelLayout.parse("tp=8,pp=4")
    with pytest.raises(UserError, match="32 ranks"):
        next(verify_layout(tiny_model("AEMR"), layout, lambda model: None, PATH))


def test_a_trial_that_could_not_run_does_not_hold() -> None:
    good = Check("forward", 0.0, 1e-9)
    assert CaseResult("all", "TP", "tp=2", "float64", (good,)).passed
    assert not CaseResult("all", "TP", "tp=2", "float64", (), "it failed").passed
    assert not Check("forward", float("nan"), 1e-9).passed


def test_tensor_difference() -> None:
    one, zero = np.ones(3), np.zeros(3)
    assert (
        tensor_difference(one, one * (1 + FLOAT64.tolerances["gradients"]))
        <= 2 * FLOAT64.tolerances["gradients"]
    )
    assert tensor_difference(zero, zero) == 0.0
    assert tensor_difference(zero, one) == np.inf
    assert tensor_difference(one, np.ones(4)) == np.inf


def test_a_neighbour_in_bfloat16_is_no_difference() -> None:
    values = np.array([101.0, 1.0, -0.4375, 0.0], np.float32)
    ulp = np.array([0.5, 2.0**-7, 2.0**-9, 0.0], np.float32)
    assert parameter_difference(values, values + ulp) == 0.0
    assert parameter_difference(values + ulp, values) == 0.0
    two = values + 2 * ulp * np.array([0, 1, 0, 0], np.float32)
    assert parameter_difference(values, two) == pytest.approx(2.0**-6 / 101)
    exact = values.astype(np.float32) * np.float32(1 + 2.0**-20)  # a float32 copy, not bfloat16
    assert parameter_difference(exact, exact + ulp) == tensor_difference(exact, exact + ulp) > 0.0
    assert parameter_difference(values, values[:3]) == np.inf


@pytest.mark.slow  # a page of the documentation runs the command, too
@pytest.mark.gpu  # `verify` takes GPUs where there are enough
@pytest.mark.processes
def test_a_recipe_verified(capsys: pytest.CaptureFixture[str]) -> None:
    """End to end: two ranks, every check of every case, as JSON."""
    overrides = ["pattern=AR", "num_layers=2"]
    assert verify_recipe(resolve("nam56r_tiny", overrides, "tp=2,etp=none"), as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"]
    assert [(c["model"], c["axis"], c["dtype"]) for c in answer["cases"]] == [
        ("all", "TP", "float64"),
        ("A", "together", "float64"),
        ("R", "together", "float64"),
        ("all", "together", "float32"),
        ("all", "together", "bfloat16"),
    ]
    assert answer.keys() == {
        *("schema", "recipe", "layout", "ranks", "device", "backend", "passed", "cases")
    }
    assert (answer["schema"], answer["ranks"]) == (2, 2)
    assert answer["backend"] == BACKENDS[device_for(2)]
    assert [case["kernels"] for case in answer["cases"]] == [
        kernels_for(device_for(2), case["dtype"]).name for case in answer["cases"]
    ]
    for case in answer["cases"]:
        assert case.keys() == {
            *(
                "model",
                "axis",
                "layout",
                "dtype",
                "kernels",
                "checks",
                "error",
                "diagnosis",
                "passed",
            )
        }
        assert [check["name"] for check in case["checks"]] == [
            *("build", "tags", "forward", "aux loss", "gradients", "replicas", "gradient norm"),
            *("step", "checkpoint"),
        ]
        for check in case["checks"]:
            assert check.keys() == {
                *("name", "difference", "tolerance", "rounding", "where", "problem", "passed")
            }


def test_a_finding_as_json() -> None:
    """What is no number is null: JSON has neither infinity nor NaN."""
    first = TensorDifference("output", "embedding", None, None, np.inf, 1e-9, None, None, np.nan)
    case = CaseResult(
        "all",
        "TP",
        "tp=2",
        "float64",
        (Check("forward", np.nan, 1e-9),),
        diagnosis=Diagnosis("forward", "", first, "TP alone"),
    )
    answer = verify_document("r", ParallelLayout.parse("tp=2"), "cuda", [case])
    json.dumps(answer, allow_nan=False)
    assert (answer["passed"], answer["backend"]) == (False, "nccl")
    (plain,) = answer["cases"]
    assert plain["checks"][0]["difference"] is None
    diagnosis = plain["diagnosis"]
    assert diagnosis.keys() == {"check", "parameter", "first", "axis"}
    assert diagnosis["first"] == {
        "kind": "output",
        "module": "embedding",
        "layer": None,
        "family": None,
        "difference": None,
        "tolerance": 1e-9,
        "rounding": None,
        "expected": None,
        "found": None,
    }


def test_axes_in_pairs() -> None:
    def pairs(text: str) -> list[tuple[str, str]]:
        return [(n, p.short()) for n, p in axes_in_pairs(ParallelLayout.parse(text))]

    assert pairs("tp=2,cp=2") == []  # the only pair is the layout
    assert pairs("tp=2,cp=2,pp=2") == [
        ("TP with CP", "tp=2,sp=true,cp=2,etp=2"),
        ("TP with PP", "tp=2,sp=true,pp=2,etp=2"),
        ("CP with PP", "cp=2,pp=2"),
    ]
    assert [name for name, _ in axes_alone(ParallelLayout.parse("world=4,tp=2"))] == ["TP", "DP"]


def test_every_expert_is_chosen() -> None:
    model = every_expert(tiny_model("AE", moe_expert_capacity_factor=1.0))
    assert model["moe_router_topk"] == model["num_moe_experts"] == 8
    assert model["moe_expert_capacity_factor"] is None


def test_build_check() -> None:
    def step(**shapes: tuple[int, ...]) -> StepResult:
        values = {key: np.ones(shape) for key, shape in shapes.items()}
        return StepResult([1.0], [1.0], {}, GlobalValues(values), GlobalValues(values))

    def build(result: StepResult) -> Check:
        return compare(step(a=(2, 2), b=(3,)), result, FLOAT64)[0]

    assert build(step(a=(2, 2), b=(3,))).passed
    assert (build(step(a=(2, 2))).difference, build(step(a=(2, 2))).where) == (1.0, "b")
    assert build(step(a=(4,), b=(3,), c=(1,))).difference == 2.0


def test_what_is_no_number_is_worst() -> None:
    values = GlobalValues({"a": np.ones(2), "b": np.ones(2)})
    broken = GlobalValues({"a": np.array([1.0, np.nan]), "b": np.ones(2) + 0.5})
    checks = compare(
        StepResult([1.0], [1.0], {}, values, values),
        StepResult([1.0], [1.0], {}, broken, values),
        FLOAT64,
    )
    grads = next(check for check in checks if check.name == "gradients")
    assert (grads.where, grads.passed) == ("a", False)


def test_what_is_not_part_of_the_proof_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks draw dropout masks of their own: compared, they would accuse every layout."""
    proved: list[Any] = []
    monkeypatch.setattr(
        "nemo_megacpp.proof.verification.verify_layout",
        lambda model, *_: proved.append(model) or [],
    )
    overrides = ["hidden_dropout=0.1", "packed_documents=true", "pattern=AEM"]
    assert verify_recipe(resolve("nam56r_tiny", overrides, "tp=2"), as_json=True) == 0
    told = capsys.readouterr().err
    assert "without hidden_dropout=0.1: each rank draws" in told
    assert "packed" not in told, "packs are part of the proof"
    assert "defaults taken: num_layers: 12 (depth of the recipe)" in told
    assert proved[0]["hidden_dropout"] == 0.1
    assert proxy_model(proved[0], ParallelLayout(), {})["hidden_dropout"] == 0.0
