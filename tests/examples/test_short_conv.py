"""The example family of the documentation: a user's own block, exact in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_megacpp.families import load_families
from nemo_megacpp.layout import ParallelLayout, check_layout
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.proof.checks import FLOAT64, compare
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.views import shape_of
from nemo_megacpp.runtime.workers import WorkerPool
from tests.path import run_step
from tests.reference import Reference

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "short_conv.py")


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        pytest.param("C", "tp=2", marks=pytest.mark.slow),
        pytest.param("C", "tp=2,sp=false", marks=pytest.mark.slow),
        pytest.param("C", "cp=2", marks=pytest.mark.slow),
        pytest.param("C", "tp=2,cp=2", marks=pytest.mark.slow),
        pytest.param("CMER", "tp=2,cp=2", marks=pytest.mark.slow),
        ("CMER", "pp=2,ep=2,tp=2,etp=1"),
    ],
)
def test_every_layout_gives_the_numbers_of_one_rank(
    ranks: WorkerPool, reference: Reference, pattern: str, layout: str
) -> None:
    model = tiny_model(pattern, family_modules=[EXAMPLE])
    spec = StepSpec(model, objective="logits", dtype="float64")
    weights, expected = reference(spec)
    place = ParallelLayout.parse(layout)
    result = ranks.run(place.world, run_step, spec, place, weights)[0]
    assert any("conv_weight" in key and "layers.0." in key for key in result.gradients.values)
    broken = [check for check in compare(expected, result, FLOAT64) if not check.passed]
    assert not broken


def test_its_documents_do_not_see_each_other(ranks: WorkerPool, reference: Reference) -> None:
    model = tiny_model("C", family_modules=[EXAMPLE])
    packed = StepSpec(model, objective="logits", dtype="float64", documents=(4, 12))
    whole = StepSpec(model, objective="logits", dtype="float64")
    weights, together = reference(packed)
    alone = ranks.run(1, run_step, whole, ParallelLayout(), weights)[0]
    assert together.losses != alone.losses
    place = ParallelLayout.parse("cp=2")
    split = ranks.run(2, run_step, packed, place, weights)[0]
    assert all(check.passed for check in compare(together, split, FLOAT64))


def test_a_recipe_names_its_module_and_layouts_obey_its_rules() -> None:
    recipe = resolve("nam56r_tiny", [f"family_modules=[{EXAMPLE}]", "pattern=CECM"])
    assert recipe.pattern.letters == "CECM" * 3
    shape = shape_of(recipe)
    assert check_layout(ParallelLayout.parse("tp=2,cp=2"), shape) == []
    for layout, rule in (
        ("tp=3,sp=false", "short-conv-channels"),
        ("tp=4,cp=16", "short-conv-channels-cp"),  # each of them divides 224, both together do not
    ):
        broken = check_layout(ParallelLayout.parse(layout), shape)
        assert rule in {violation.rule for violation in broken}


def test_a_pattern_of_another_model_does_not_heed_its_rules() -> None:
    load_families([EXAMPLE])
    shape = shape_of(resolve("nam56r_tiny", ["hidden_size=224", "pattern=AEME"]))
    rules = {violation.rule for violation in check_layout(ParallelLayout(), shape)}
    assert not rules
    assert HybridPattern.parse("c").letters == "C"
