"""The long-context ladder: its rungs, what it prints, and that it stops where a number changes."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from nemo_megacpp.cli import read_arguments
from nemo_megacpp.commands.ladder import climb_recipe
from nemo_megacpp.errors import UserError
from nemo_megacpp.proof.case_runner import CaseResult
from nemo_megacpp.proof.checks import Check
from nemo_megacpp.proof.ladder import Ladder, RungResult, build_ladder, climb
from nemo_megacpp.proof.ladder_report import ladder_document, print_ladder
from nemo_megacpp.recipes.recipe import Recipe, resolve
from nemo_megacpp.recipes.views import shape_of
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool
from tests.path import PATH
from tests.proof.faults import BrokenRanks


def _shape(recipe: Recipe) -> Any:
    batch = dataclasses.replace(recipe.training, micro_batch_size=1, global_batch_size=2)

    def shape(fields: Mapping[str, Any]) -> Any:
        return shape_of(dataclasses.replace(recipe, model=dict(fields), training=batch))

    return shape


def _ladder(*settings: str, layout: str | None = None, ranks: int = 16, **options: Any) -> Ladder:
    recipe = resolve("nam56r_tiny", settings, layout)
    model = {"m2rnn_num_heads": 28, **recipe.model}
    return build_ladder(model, recipe.layout, _shape(recipe), "cpu", ranks, **options)


def test_a_rung_adds_one_change() -> None:
    rungs = _ladder("pattern=AEMR", "depth=4").rungs
    assert [(r.name, r.tokens, r.layout.short(), bool(r.documents)) for r in rungs] == [
        ("canary", 64, "tp=1", False),
        ("sequence x2", 128, "tp=1", False),
        ("sequence x2", 256, "tp=1", False),
        ("TP with SP", 256, "tp=2,sp=true,etp=1", False),  # the least that E blocks train at
        ("CP", 256, "tp=2,sp=true,cp=2,etp=1", False),
        ("packs", 256, "tp=2,sp=true,cp=2,etp=1", True),
        ("recompute", 256, "tp=2,sp=true,cp=2,etp=1", True),
    ]
    assert rungs[-2].documents == (128, 64, 64)
    again = {k: v for k, v in rungs[-1].model.items() if k.startswith("recompute_")}
    assert again == {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe", "mamba", "m2rnn"],
    }
    for below, rung in pairwise(rungs[4:]):
        moved = (
            below.layout != rung.layout,
            below.documents != rung.documents,
            below.model != rung.model,
        )
        assert sum(moved) == 1, rung.name


def test_tp_and_sp_are_two_rungs_where_they_can_be() -> None:
    rungs = _ladder("pattern=AM|MR", "depth=4", "tp=1", doublings=1, start=128).rungs
    assert [(r.name, r.tokens, r.layout.short()) for r in rungs[:5]] == [
        ("canary", 128, "tp=1"),
        ("sequence x2", 256, "tp=1"),
        ("TP", 256, "tp=2,sp=false,etp=1"),
        ("SP", 256, "tp=2,sp=true,etp=1"),
        ("CP", 256, "tp=2,sp=true,cp=2,etp=1"),
    ]
    assert {r.model["hybrid_pattern"] for r in rungs} == {"AMMR"}


def test_the_recipe_gives_degrees_and_recompute() -> None:
    full = ("recompute_granularity=full", "recompute_method=block", "recompute_num_layers=2")
    rungs = _ladder("pattern=AM", "depth=2", *full, layout="tp=4,cp=4").rungs
    assert rungs[-1].layout.short() == "tp=4,sp=true,cp=4,etp=1"
    assert rungs[-1].model["recompute_method"] == "block"
    assert "recompute_method" not in rungs[-2].model


def test_the_ranks_bound_the_ladder() -> None:
    two = _ladder("pattern=AM", "depth=2", ranks=2)
    assert [rung.name for rung in two.rungs if rung.layout.cp > 1] == []
    assert two.left_out == ("CP: TP=2 CP=2 needs 4 ranks, there are 2",)
    one = _ladder("pattern=AM", "depth=2", ranks=1)
    assert {rung.layout.world for rung in one.rungs} == {1} and len(one.left_out) == 2
    assert [rung.name for rung in one.rungs][-2:] == ["packs", "recompute"]


def test_a_start_that_does_not_divide() -> None:
    with pytest.raises(
        UserError, match=r"--start 100 must be a multiple of 32, .* Use 96 or 128\."
    ):
        _ladder("pattern=AM", "depth=2", start=100)
    args = read_arguments(["ladder", "nam56r_tiny", "--start", "none"])
    with pytest.raises(UserError, match="--start 'none' must be a whole number"):
        args.run(args)
    args = read_arguments(["ladder", "nam56r_tiny", "--layout", "tp=3"])
    with pytest.raises(UserError, match="not divisible by TP = 3"):
        args.run(args)


def test_an_illegal_rung_says_why() -> None:
    recipe = resolve("nam56r_tiny", ["pattern=AM", "depth=2"], "tp=4")
    rungs = _ladder("pattern=AM", "depth=2", layout="tp=4").rungs
    pool = SimpleNamespace(device="cpu")
    (result,) = climb(rungs[-3:], _shape(recipe), PATH, _never, pool, "float32")  # type: ignore[arg-type]
    assert not result.passed and result.rung.name == "CP"
    assert "mamba_num_heads = 28 is not divisible by TP x CP = 4 x 2 = 8" in str(result.case.error)


def _never(*_: Any) -> Any:
    raise AssertionError


def _results(*, failed: bool) -> tuple[Ladder, list[RungResult]]:
    ladder = _ladder("pattern=AM", "depth=2")
    good = tuple(Check(name, 0.0, 1e-9) for name in ("forward", "gradients", "step"))
    bad = (good[0], Check("gradients", 0.5, 1e-9, "decoder.layers.0.weight"), good[2])
    results = [
        RungResult(rung, CaseResult("all", rung.name, rung.layout.short(), "float64", good))
        for rung in ladder.rungs
    ]
    first = dataclasses.replace(results[0], peaks=(1_500_000, 2_500_000), seconds=0.5)
    broken = dataclasses.replace(results[3], case=dataclasses.replace(results[3].case, checks=bad))
    return ladder, [first, *results[1:3], broken] if failed else [first, *results[1:]]


@pytest.mark.parametrize("failed", [False, True])
def test_what_is_printed(failed: bool) -> None:
    ladder, results = _results(failed=failed)
    output = io.StringIO()
    print_ladder(Console(file=output, width=130), ladder, results)
    shown = output.getvalue()
    assert "2.50 MB" in shown and "256" in shown  # of the fullest rank; 2 x 64 tokens in 0.5 s
    document = ladder_document("nam56r_tiny", "float32", "cpu", ladder, results)
    json.dumps(document, allow_nan=False)
    assert document["rungs"][0]["peak_bytes"] == [1_500_000, 2_500_000]
    assert document["passed"] is not failed
    if failed:
        assert "stopped at the rung TP" in shown and shown.count("not run") == 4
        assert "gradients differ by 5.0e-01, allowed 1.0e-09" in shown
        assert (document["stopped_at"], document["not_run"][0]) == ("TP", "SP")
    else:
        assert "every rung gives the numbers of one rank" in shown and "not run" not in shown
        assert document["stopped_at"] is None and document["not_run"] == []


def test_a_rung_that_cannot_be_measured_has_failed() -> None:
    ladder = _ladder("pattern=AM", "depth=2")

    def out_of_memory(*_: Any) -> Any:
        raise WorkerError("rank 0: torch.OutOfMemoryError: CUDA out of memory")

    pool: Any = SimpleNamespace(device="cpu", run=out_of_memory)
    recipe = resolve("nam56r_tiny", ["pattern=AM", "depth=2"])
    (result,) = climb(ladder.rungs, _shape(recipe), PATH, _never, pool, "float32")
    assert "out of memory" in str(result.case.error) and result.tokens_per_second is None


@pytest.mark.slow
def test_a_whole_ladder(ranks: WorkerPool, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = resolve("nam56r_tiny", ["pattern=AEMR", "depth=4"])
    assert climb_recipe(recipe, 4, None, 1, as_json=True, pool=ranks) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] and document["not_run"] == []
    rungs = document["rungs"]
    assert [len(rung["peak_bytes"]) for rung in rungs] == [1, 1, 2, 4, 4, 4]
    assert all(rung["tokens_per_second"] > 0 for rung in rungs)
    most = [max(rung["peak_bytes"]) for rung in rungs]
    canary, doubled, split, over_cp, packed, again = most
    assert canary < doubled and split < doubled and over_cp < split and again < packed


@pytest.mark.slow
def test_it_stops_at_the_rung_that_shows_a_fault(
    ranks: WorkerPool, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = BrokenRanks(ranks, "zigzag not undone")
    model = ["m2rnn_context_parallel=all_to_all"]
    recipe = resolve("nam56r_tiny", ["pattern=R", "depth=1", *model])
    assert climb_recipe(recipe, 4, None, 1, as_json=False, pool=broken) == 1
    shown = capsys.readouterr().out
    assert "stopped at the rung CP" in shown and shown.count("not run") == 2
    assert "(R, layer 1) differs by" in shown
    assert "axis: CP (the rungs below agree)" in shown
