"""``nemo-megacpp compare``, on recipes and on hand-made run folders."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_megacpp.cli import read_arguments
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.recipe_differences import (
    AXES,
    differences,
    moved_axes,
)
from nemo_megacpp.recipes.training import Training
from nemo_megacpp.runs.run_folder import METRICS_FILE, RECIPE_FILE


def _run(*words: str) -> int:
    args = read_arguments(["compare", *words])
    return int(args.run(args))


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert _run(*words, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _moved(one: tuple[str, ...], two: tuple[str, ...], name: str = "nam56r_tiny") -> list[str]:
    return moved_axes(differences(resolve(name, one), resolve(name, two)))


@pytest.mark.parametrize(
    ("one", "two", "axes"),
    [
        ((), (), []),
        ((), ("tp=4",), ["TP"]),
        # SP is TP's activation layout, and cannot be on at TP = 1.
        (("tp=1",), ("tp=2",), ["TP"]),
        (("pattern=AM", "tp=2", "sp=true"), ("pattern=AM", "tp=2", "sp=false"), ["SP"]),
        (("etp=null",), ("etp=null", "tp=4"), ["TP", "ETP"]),
        (("etp=null", "pattern=AM"), ("etp=null", "pattern=AM", "tp=4"), ["TP"]),
        ((), ("cp=2",), ["CP"]),
        ((), ("m2rnn_context_parallel=serial",), ["CP"]),
        ((), ("ep=2",), ["EP"]),
        ((), ("pp=2",), ["PP"]),
        # Where the cuts are is part of PP; that a pipeline of another length is cut elsewhere, too.
        (("pp=2",), ("pp=2", "pattern=AEM|EAEMEAEMR"), ["PP"]),
        ((), ("pp=2", "pattern=AEM|EAEMEAEMR"), ["PP"]),
        ((), ("pattern=AEM|EAEMEAEMR",), []),
        (("pp=2",), ("pp=2", "vpp=3"), ["VPP"]),
        (("world_size=4",), ("world_size=8",), ["DP"]),
        (("world_size=8",), ("world_size=8", "tp=4"), ["TP"]),
        (("world_size=4",), ("world_size=8", "tp=4"), ["TP"]),
        (("world_size=2",), ("world_size=8", "tp=4"), ["TP", "DP"]),
        ((), ("global_batch_size=16",), ["batch"]),
        ((), ("seq_length=512",), ["sequence"]),
        ((), ("precision=bf16",), ["precision"]),
        ((), ("m2rnn_kernel=torch",), ["kernels"]),
        ((), ("moe_token_dispatcher_type=allgather",), ["kernels"]),
        ((), ("recompute_granularity=selective", "recompute_modules=[moe]"), ["recompute"]),
        ((), ("lr=1e-3",), ["optimizer"]),
        ((), ("use_distributed_optimizer=false",), ["optimizer"]),
        ((), ("seed=1",), ["data"]),
        ((), ("data=data/mine",), ["data"]),
        ((), ("resume=runs/x",), ["start"]),
        ((), ("hidden_size=448",), ["model"]),
        ((), ("pattern=AEMR",), ["model"]),
        ((), ("log_interval=1", "stop_after=3", "run_dir=x"), []),
        ((), ("tp=4", "global_batch_size=16", "lr=1e-3"), ["TP", "batch", "optimizer"]),
    ],
)
def test_differences_are_sorted_into_axes(
    one: tuple[str, ...], two: tuple[str, ...], axes: list[str]
) -> None:
    assert _moved(one, two) == axes
    assert _moved(two, one) == axes


def test_a_training_setting_has_the_axis_of_its_group() -> None:
    """What decides what a step computes has one; what is logged and saved has none."""
    base, changed = resolve("nam56r_tiny"), {}
    for field in dataclasses.fields(Training):
        training = copy.copy(base.training)
        object.__setattr__(training, field.name, "another value")
        other = dataclasses.replace(base, training=training)
        changed[field.name] = [found.axis for found in differences(base, other)]
    assert {axis for axes in changed.values() for axis in axes} <= {*AXES}
    assert changed["micro_batch_size"] == ["batch"]
    assert changed["packed_documents"] == changed["seed"] == ["data"]
    assert changed["precision"] == ["precision"]
    for name in ("lr", "lr_decay_style", "max_steps", "adam_eps", "use_distributed_optimizer"):
        assert changed[name] == ["optimizer"]
    for name in ("stop_after", "log_interval", "wandb_name", "save_interval", "keep_every"):
        assert changed[name] == []


def test_a_default_that_is_written_out_is_no_difference(tmp_path: Path) -> None:
    file = tmp_path / "same.yaml"
    file.write_text(yaml.safe_dump(resolve("nam56r_tiny").to_mapping()))
    written = resolve(str(file), ["normalization=RMSNorm"])
    assert differences(resolve("nam56r_tiny"), written) == []


def test_one_axis_has_its_effect_from_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, "nam56r", "nam56r", "--in-b", "tp=4", "--world-size", "8")
    assert found["moved"] == ["TP"] and found["conclusion"] == "one axis moved"
    assert found["differences"] == [{"axis": "TP", "setting": "tp", "a": "2", "b": "4"}]
    memory = {pair["name"]: pair for pair in found["contract"]["memory"]}
    # TP halves what it splits; the experts, at ETP = 1, it leaves whole.
    assert 0.5 < memory["parameters"]["ratio"] < 1
    assert 0.45 < memory["activations"]["ratio"] < 0.55
    sent = {pair["name"]: pair for pair in found["contract"]["sent"]}
    # On p of n ranks a ring sends (n - 1) / n, on twice as many, once for each replica: 3/4 x 4
    # over 1/2 x 2, with as many microbatches for half as many replicas.
    assert sent["over tp"]["ratio"] == pytest.approx(3, rel=0.01)
    assert sent["between nodes"]["a"] == 0 == sent["between nodes"]["b"]
    assert found["runs"] is None


def test_several_axes_draw_no_conclusion(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("nam56r", "nam56r_mamba3", "--in-b", "tp=4", "--in-b", "seq_length=8192")
    found = _json(capsys, *words)
    assert found["moved"] == ["TP", "sequence", "model"]
    assert found["contract"] is None and found["runs"] is None
    assert _run(*words) == 0
    out = capsys.readouterr().out
    assert "3 axes moved: TP, sequence, model" in out
    assert "No conclusion can be drawn" in out
    assert "B / A" not in out


def test_nothing_moved(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("nam56r", "nam56r") == 0
    out = capsys.readouterr().out
    assert "No axis moved" in out and "B / A" not in out


def _run_folder(
    path: Path, overrides: tuple[str, ...] = (), *, seconds: float = 2.0, shift: float = 0.0
) -> Path:
    """A run of 6 steps; its loss falls from 7 by a quarter a step, and step 4 is off by `shift`."""
    file = path / RECIPE_FILE
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump(resolve("nam56r_tiny", overrides).to_mapping()))
    records: list[dict[str, float]] = []
    for step in range(1, 7):
        loss = 7 - step / 4 + (shift if step == 4 else 0)
        pace = 60 if step == 1 else seconds
        records.append(
            {"step": step, "loss": loss, "seconds": pace, "tokens_per_second": 2048 / pace}
        )
    records.append({"step": 6, "heldout_loss": 5.75 + shift})
    (path / METRICS_FILE).write_text("\n".join(map(json.dumps, records)))
    return path


def test_runs_that_differ_on_one_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = _run_folder(tmp_path / "a")
    b = _run_folder(tmp_path / "b", ("tp=4",), seconds=1.0, shift=0.012)
    picture = tmp_path / "both.png"
    found = _json(capsys, str(a), str(b), "--plot", str(picture))
    assert found["moved"] == ["TP"] and found["contract"] is not None
    runs = found["runs"]
    assert (runs["steps"], runs["last_step"], runs["at_step"]) == (6, 6, 4)
    assert runs["largest_loss_difference"] == pytest.approx(0.012)
    assert runs["mean_loss_difference"] == pytest.approx(0.002)
    assert runs["heldout_loss"]["ratio"] == pytest.approx(5.762 / 5.75)
    # The first step, of a minute, is left out.
    assert runs["seconds_per_step"]["ratio"] == pytest.approx(0.5)
    assert runs["tokens_per_second"]["a"] == pytest.approx(1024)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert _run(str(a), str(b)) == 0
    out = capsys.readouterr().out
    assert "first difference 0.00e+00 (step 1), largest 1.20e-02 (step 4), mean 2.00e-03" in out
    assert "drew their own initial weights" in out


def test_runs_from_one_checkpoint_started_with_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = _run_folder(tmp_path / "a", ("resume=runs/x", "limit_val_batches=2"))
    b = _run_folder(tmp_path / "b", ("resume=runs/x", "tp=4"))
    found = _json(capsys, str(a), str(b))
    assert found["moved"] == ["TP"]
    assert found["notes"] == ["Held-out loss is over 2 batches in A, and over 4 in B."]


def test_two_runs_of_one_recipe_show_the_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = _run_folder(tmp_path / "a"), _run_folder(tmp_path / "b", ("run_dir=b",), shift=0.5)
    found = _json(capsys, str(a), str(b))
    assert found["moved"] == [] and found["contract"] is None
    assert found["runs"]["largest_loss_difference"] == pytest.approx(0.5)
    assert _run(str(a), str(b)) == 0
    out = capsys.readouterr().out
    assert "the spread from run to run" in out
    assert "(training at step 6, held-out at step 6)" in out
    (b / METRICS_FILE).write_text(
        '{"step": 1, "loss": 7.0, "seconds": 1.0, "tokens_per_second": 2.0}'
    )
    assert _run(str(a), str(b)) == 0
    out = capsys.readouterr().out
    assert "(training at step 1)" in out and "held-out" not in out


def test_runs_that_differ_on_two_axes_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = _run_folder(tmp_path / "a"), _run_folder(tmp_path / "b", ("tp=4", "lr=1e-3"))
    found = _json(capsys, str(a), str(b))
    assert found["moved"] == ["TP", "optimizer"]
    assert found["runs"] is None and found["contract"] is None


def test_runs_without_a_common_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = _run_folder(tmp_path / "a"), _run_folder(tmp_path / "b")
    speed = {"seconds": 1.0, "tokens_per_second": 1.0}
    late = [{"step": 9, "loss": float("nan"), **speed}, {"step": 10, "loss": 3.0, **speed}]
    (b / METRICS_FILE).write_text("\n".join(map(json.dumps, late)))
    runs = _json(capsys, str(a), str(b))["runs"]
    assert runs["steps"] == 0 and runs["largest_loss_difference"] is None
    assert runs["heldout_loss"]["a"] is None
    assert _run(str(a), str(b)) == 0
    assert "no step in common" in capsys.readouterr().out


def test_a_run_and_a_recipe_compare_as_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _json(capsys, str(_run_folder(tmp_path / "a")), "nam56r_tiny", "--in-b", "tp=4")
    assert (found["a"]["kind"], found["b"]["kind"]) == ("run", "recipe")
    assert found["moved"] == ["TP"] and found["contract"] and found["runs"] is None


def test_bad_input(tmp_path: Path) -> None:
    run = str(_run_folder(tmp_path / "run"))
    empty = tmp_path / "empty"
    empty.mkdir()
    silent = _run_folder(tmp_path / "silent")
    (silent / METRICS_FILE).write_text("")
    strange = _run_folder(tmp_path / "strange")
    (strange / METRICS_FILE).write_text('{"step": 1}\n')
    for words, message in (
        (("nam56r", "nam57r"), "There is no recipe 'nam57r'"),
        (("nam56r", str(empty)), "it has no record/metrics.jsonl"),
        (("nam56r", str(silent)), "has not made a step yet"),
        (("nam56r", str(strange)), "is damaged"),
        ((run, run, "--in-a", "tp=4"), "cannot be changed"),
        ((run, run, "--world-size", "8"), "cannot be changed"),
        (("nam56r", "nam56r", "--in-b", "tp=3"), "B, nam56r: Layout tp=3"),
        (("nam56r", "nam56r", "--world-size", "0"), "must be a whole number"),
        (("nam56r", "nam56r", "--plot", "x.png"), "must be run folders"),
        ((run, run, "--plot", "x.pdf"), "ends in .png"),
    ):
        with pytest.raises(UserError) as caught:
            _run(*words)
        assert message in str(caught.value), words


def _measured_run(
    path: Path, overrides: tuple[str, ...] = (), *, memory: float, slowest: float
) -> Path:
    """A run of 6 steps that recorded its memory, and the seconds of each rank's first step."""
    _run_folder(path, overrides)
    lines = [json.loads(line) for line in (path / METRICS_FILE).read_text().splitlines()]
    lines[0] |= {"seconds_fastest": 59.0, "seconds_slowest": slowest, "memory": memory / 2}
    lines[4] |= {"seconds": 4.0, "memory": memory, "memory_added": memory / 4}
    (path / METRICS_FILE).write_text("\n".join(map(json.dumps, lines)))
    return path


def test_what_the_runs_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = _measured_run(tmp_path / "a", memory=60e9, slowest=61.0)
    b = _measured_run(tmp_path / "b", ("tp=4",), memory=90e9, slowest=66.0)
    found = _json(capsys, str(a), str(b), "--hbm", "80GB")
    runs = {
        pair["name"]: (pair["a"], pair["b"])
        for key in ("memory", "first_step_seconds", "spread_seconds")
        for pair in found["runs"][key]
    }
    assert runs == {
        "peak": (60e9, 90e9),
        "since the model's build": (15e9, 22.5e9),
        "headroom": (20e9, -10e9),
        "first step": (60.0, 60.0),
        "its fastest rank": (59.0, 59.0),
        "its slowest rank": (61.0, 66.0),
        "fastest tenth below": (2.0, 2.0),
        "slowest tenth above": (pytest.approx(3.2), pytest.approx(3.2)),
    }
    assert found["runs"]["seconds_per_step"]["a"] == 2.0
    planned = {pair["name"]: pair for pair in found["contract"]["memory"]}
    assert planned["headroom"]["a"] == 80e9 - planned["total"]["a"]
    assert _run(str(a), str(b), "--hbm", "80GB") == 0
    out = capsys.readouterr().out
    assert "Measured peak memory of the fullest rank" in out and "-10.0 GB" in out
    assert "headroom" not in (_run(str(a), str(b)), capsys.readouterr().out)[1]


def test_runs_of_an_older_version_measured_less(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = _run_folder(tmp_path / "a"), _run_folder(tmp_path / "b")
    assert _run(str(a), str(b), "--hbm", "80GB") == 0
    out = capsys.readouterr().out
    assert "Measured peak memory" not in out and "slowest rank" not in out
    assert "first step" in out


def test_a_layout_that_was_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = _run_folder(tmp_path / "a"), _run_folder(tmp_path / "b", ("tp=4", "lr=1e-3"))
    asked = ("--layout", "tp=3", "--layout", "cp=2", "--hbm", "80GB")
    illegal, legal = _json(capsys, str(a), str(b), *asked)["untried"]
    assert (illegal["layout"], illegal["legal"]) == ("tp=3,sp=true,etp=1", False)
    assert "is not divisible by TP = 3" in illegal["reasons"][0] and illegal["memory"] is None
    assert "tp=2,sp=true,etp=1" in illegal["nearest"]
    assert (legal["layout"], legal["legal"]) == ("tp=2,sp=true,cp=2,etp=1", True)
    assert 0 < legal["memory"] < 1e9 and legal["reasons"] == []
    assert _run(str(a), str(b), *asked) == 0
    out = capsys.readouterr().out
    assert "tp=3,sp=true,etp=1 is illegal:\n    - " in out and "Nearest legal layouts: " in out
    assert "tp=2,sp=true,cp=2,etp=1 is legal: " in out and "GB free" in out
    with pytest.raises(UserError, match="Nearest legal layouts: "):
        _run("nam56r", "nam56r", "--in-b", "tp=3")
    with pytest.raises(UserError, match="A layout has no 'tq'"):
        _run("nam56r", "nam56r", "--layout", "tq=3")
