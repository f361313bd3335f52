"""`nemo-megacpp gathers`: every boundary of the families is needed, a planted one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_megacpp.commands.gathers import inspect_recipe
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.gather_verdicts import JudgedGather, judge
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.runtime.workers import WorkerPool
from tests.proof.recorded_gathers import gather_with_recorder, record_bare

EXAMPLES = Path(__file__).parents[2] / "examples"
PLANTED = {"family_modules": [str(EXAMPLES / "convenience_gather.py")]}
EVERY_EXPERT = {"moe_router_topk": 8}


def gathers(ranks: WorkerPool, pattern: str, layout: str, **changes: Any) -> list[JudgedGather]:
    place = ParallelLayout.parse(layout)
    model = tiny_model(pattern, **{**EVERY_EXPERT, **changes})
    spec = StepSpec(model, global_batch_size=place.pp * place.data_parallel_size)
    return judge(ranks.run(place.world, record_bare, spec, place), place)


def shown(found: list[JudgedGather]) -> list[str]:
    return [
        f"{one.gather.place.family} {one.gather.phase} {one.gather.kind} {one.group}: "
        f"{one.judged.why}"
        for one in found
    ]


@pytest.mark.parametrize(
    ("pattern", "layout", "changes"),
    [
        ("AEMR", "tp=2", {}),
        ("AEMR", "cp=2", {}),
        ("AEMR", "tp=2,ep=2,etp=2,world=4", {}),
        ("AEMR", "tp=2,ep=2,etp=1", {}),
        ("AEMR", "tp=2,cp=2,ep=2,etp=1", {}),
        ("MRMR", "tp=2,cp=2", {"mode": "mamba3", "m2rnn_context_parallel": "serial"}),
        ("E", "tp=2,ep=2,etp=1", {"moe_token_dispatcher_type": "allgather"}),
        (
            "AEMR",
            "tp=2,pp=2",
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
        ),
        ("E", "tp=2,cp=2,etp=1", {"moe_expert_capacity_factor": 1.0}),
        ("AFA", "tp=2,cp=2", {"cp_comm_type": "p2p"}),
        ("CEC", "tp=2,cp=2", {"family_modules": [str(EXAMPLES / "short_conv.py")]}),
    ],
)
@pytest.mark.slow
def test_every_gather_of_the_families_is_needed(
    ranks: WorkerPool, pattern: str, layout: str, changes: dict[str, Any]
) -> None:
    found = gathers(ranks, pattern, layout, **changes)
    assert found
    assert [
        line
        for one, line in zip(found, shown(found), strict=True)
        if one.judged.verdict != "needed"
    ] == []


@pytest.mark.parametrize("layout", ["tp=2", pytest.param("tp=2,cp=2", marks=pytest.mark.slow)])
def test_a_planted_convenience_gather_is_named(ranks: WorkerPool, layout: str) -> None:
    found = gathers(ranks, "WW", layout, **PLANTED)
    undone = [one.gather for one in found if one.judged.verdict == "undone"]
    assert {one.place.class_name for one in undone} == {"BoundedLayer"}
    assert [(one.place.layer, one.phase) for one in undone] == [
        *((1, "forward"), (2, "forward"), (2, "backward"), (1, "backward"))
    ]
    assert all(one.caller.startswith("convenience_gather.py:") for one in undone[:2])
    assert {one.bytes for one in undone} == {16 * 48 * 4 // ParallelLayout.parse(layout).cp}


def test_a_backend_holds_no_tensor_of_the_step(ranks: WorkerPool) -> None:
    # A thread of gloo frees a call's tensors when it is scheduled again, in another module maybe.
    assert ranks.run(2, gather_with_recorder)[0] == ([0.0, 0.0, 1.0, 1.0], False)


@pytest.mark.slow  # a page of the documentation runs the command, too
def test_a_recipe_inspected(ranks: WorkerPool, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["family_modules=[examples/convenience_gather.py]", "pattern=WA", "depth=2"]
    recipe = resolve("nam56r_tiny", overrides, "tp=2,etp=none")
    assert inspect_recipe(recipe, as_json=True, pool=ranks) == 1
    answer = json.loads(capsys.readouterr().out)
    undone = [one for one in answer["gathers"] if one["verdict"] == "undone"]
    assert answer["undone"] == len(undone) == 2
    assert {(one["layer"], one["class"]) for one in undone} == {(1, "BoundedLayer")}
    known = [one["recipe_bytes"] for one in answer["gathers"] if one["module"].endswith("qkv")]
    length, width = 256, 224
    assert set(known) == {recipe.training.micro_batch_size * length * width * 4}
