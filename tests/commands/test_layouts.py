"""``nemo-megacpp layouts`` from the command line: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_megacpp.cli import read_arguments
from nemo_megacpp.errors import UserError
from nemo_megacpp.preflight.model_checks import validate_model, validate_recipe_layout
from nemo_megacpp.recipes.recipe import resolve

TINY = ("nam56r_tiny", "micro_batch_size=1")


def _run(*words: str) -> int:
    args = read_arguments(["layouts", *words])
    return int(args.run(args))


def test_the_table_says_what_fits_and_groups_rejections(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run(*TINY, "--world-size", "8", "--hbm", "80GB", "--top", "3") == 0
    out = capsys.readouterr().out
    assert "on 8 ranks, 8 GPUs a node" in out
    assert out.count("nam56r_tiny") == 1
    assert "fit 80.0 GB" in out
    assert "cuts of the first" in out or "  1  " in out
    assert "speeds of dgx-h100" in out
    assert "assumed: sustained shares of the peaks" in out
    assert out.index("tokens/s") < out.index("where the time goes")
    grouped = out[out.index("Rejected") :]
    assert "sp=false" in grouped
    assert _run(*TINY, "--world-size", "8", "--rejected") == 0
    every = capsys.readouterr().out
    assert len(every[every.index("Rejected") :].splitlines()) > len(grouped.splitlines())


def test_json_has_ranks_reasons_and_all_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*TINY, "--world-size", "4", "--hbm", "80GB", "--json", "--gpus-per-node", "2") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert [entry["rank"] for entry in found["layouts"]] == list(range(1, 11))
    assert found["fitting"] == found["legal"]
    rejected = sum(reason["layouts"] for reason in found["rejected"])
    assert rejected == found["candidates"] - found["legal"]
    assert {reason["axis"] for reason in found["rejected"]} >= {"SP", "TP", "EP"} - {"EP"}
    best = found["layouts"][0]
    assert best["fits"] and best["memory"]["total"] < 80e9
    steps = [entry["estimate"]["seconds"] for entry in found["layouts"]]
    assert steps == sorted(steps)
    for entry in found["layouts"]:
        estimate = entry["estimate"]
        assert sum(estimate["parts"].values()) == pytest.approx(estimate["seconds"])
        assert 0 < estimate["model_flops_utilization"] < 1
    assert found["machine"]["gpus_per_node"] == 2 and "assumed" in found["assumptions"]


def test_a_suggestion_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    words = (*TINY, "seed=7", "pp=4", "vpp=none", "--world-size", "8", "--write", str(file))
    assert _run(*words, "--pick", "2", "--json") == 0
    picked = json.loads(capsys.readouterr().out)["layouts"][1]
    recipe = resolve(str(file))
    assert recipe.layout.short() == picked["layout"]
    assert recipe.layout.pp == 4 and recipe.layout.world == 8 and recipe.layout.vpp is None
    assert str(recipe.pattern) == picked["pattern"]
    assert recipe.pattern.letters == resolve("nam56r_tiny").pattern.letters
    assert len(recipe.pattern.chunks(4)) == 4
    assert recipe.training.seed == 7
    validate_recipe_layout(recipe)
    validate_model(recipe)
    plan = read_arguments(["plan", str(file), "--json"])
    assert plan.run(plan) == 0
    planned = json.loads(capsys.readouterr().out)
    fullest = planned["stages"][planned["fullest_stage"]]["memory"]["total"]
    assert fullest == picked["memory"]["total"]


def test_the_recipes_own_cuts_are_replaced_and_that_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run(*TINY, "pattern=A|EMEAEMEAEMR", "--world-size", "2", "--top", "40") == 0
    assert "cuts are replaced" in capsys.readouterr().out


def test_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("nam56r", "tp=1", "--world-size", "1", "--hbm", "10GB")
    assert _run(*words) == 1
    assert "none of 1 legal layouts fits 10.0 GB" in capsys.readouterr().err
    file = tmp_path / "no.yaml"
    with pytest.raises(UserError, match=r"nothing to write: no layout fits 10\.0 GB"):
        _run(*words, "--write", str(file))
    assert not file.exists()


def test_recompute_is_chosen_where_nothing_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    words = ("nam56r", "micro_batch_size=4", "tp=4", "pp=2", "vpp=none", "etp=1", "ep=4")
    hbm = ("--world-size", "8", "--hbm", "18GB")
    assert _run(*words, *hbm) == 1
    assert "--recompute auto tries recompute" in capsys.readouterr().err
    assert _run(*words, *hbm, "--recompute", "auto", "--write", str(file)) == 0
    assert "Chosen: recompute_granularity=" in capsys.readouterr().err
    plan = read_arguments(["plan", str(file), *hbm])
    assert plan.run(plan) == 0
    assert "Recomputation in the backward pass: " in capsys.readouterr().out


def test_nothing_is_legal(capsys: pytest.CaptureFixture[str]) -> None:
    # 8 rows a step cannot be shared out over 7 replicas, nor 12 layers and 28 heads over 7 x ....
    assert _run("nam56r_tiny", "tp=1", "cp=1", "pp=1", "--world-size", "7") == 2
    captured = capsys.readouterr()
    assert "no layout of 7 ranks is legal" in captured.err
    assert "Batch sizes do not fit: global 8" in captured.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--world-size", "0"), "--world-size '0' must be a whole number from 1"),
        (("--world-size", "1000000000"), "must be a whole number from 1 to 1,048,576"),
        (("--world-size", "1e9"), "must be a whole number"),
        (("--world-size=-8",), "must be a whole number"),
        (("--world-size", "many"), "must be a whole number"),
        ((), "--world-size N"),
        (("--world-size", "8", "--hbm", "lots"), "'lots' is not a memory size"),
        (("--world-size", "8", "--hbm", "141"), "is not a memory size"),
        (("--world-size", "8", "--hbm", "9PB"), "is not a memory size"),
        (("--world-size", "8", "--hbm", "1KB"), "is not the memory of a GPU"),
        (("--world-size", "8", "--gpus-per-node", "0"), "--gpus-per-node '0'"),
        (("--world-size", "8", "--machine", "dgx-h10"), "no machine 'dgx-h10'"),
        (("--world-size", "8", "--machine", "none.json"), "none.json cannot be read"),
        (("--machine", "dgx-h200", "--gpus-per-node", "16"), "more than a node of --machine"),
        (("--machine", "dgx-h100", "--hbm", "141GB"), "more than a GPU of --machine dgx-h100 has"),
        (("--world-size", "8", "--top", "x"), "--top 'x'"),
        (("--world-size", "8", "--pick", "2"), "--pick chooses what is written"),
        (("--world-size", "8", "--write", "x.txt"), "ends in .yaml"),
        (("--world-size", "8", "--write", "no/such/x.yaml"), "no folder"),
        (("--world-size", "8", "tp=3"), "No layout of 8 ranks has tp=3"),
        (("--world-size", "8", "world_size=4"), "world_size=4 and --world-size 8"),
        (("--world-size", "8", "tq=3"), "no setting 'tq'"),
    ],
)
def test_bad_input(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        _run("nam56r_tiny", *words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
