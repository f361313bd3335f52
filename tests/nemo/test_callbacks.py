"""Two real runs with packed documents: TP=2 with a profile and W&B, and its resume at TP=1."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_megacpp.contract.stages import build_stages
from nemo_megacpp.contract.work import step_operations
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.formulas.sizes import Job
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.runs.curves import Curve, read_curve
from nemo_megacpp.runs.events import read_events
from nemo_megacpp.runs.record import read_run
from nemo_megacpp.runs.run_page import write_page

pytestmark = [pytest.mark.processes, pytest.mark.slow]

# One block of each family. The vocabulary of 300 is padded to the same size in both layouts.
SETTINGS = {
    "pattern": "AEMR",
    "depth": 4,
    "hidden_size": 56,
    "seq_length": 64,
    "make_vocab_size_divisible_by": 50,
    "global_batch_size": 4,
    "packed_documents": "true",
    "max_steps": 4,
    "save_interval": 2,
    "val_check_interval": 4,
    "limit_val_batches": 1,
    "log_interval": 2,
    "warmup_steps": 1,
}

WATCHED = (
    *("wandb_project=tests", "use_pytorch_profiler=true"),
    *("profile_step_start=1", "profile_step_end=3", "profile_ranks=[1]"),
)


def _train(folder: Path, data: PreparedData, *settings: str) -> str:
    command = [sys.executable, "-m", "nemo_megacpp.cli", "train", "nam56r_tiny"]
    given = [f"{key}={value}" for key, value in SETTINGS.items()]
    done = subprocess.run(
        [*command, *given, f"data={data.root}", *settings],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the two runs printed, by their folders."""
    folder = tmp_path_factory.mktemp("runs")
    two, one = str(folder / "two"), str(folder / "one")
    layout = ("tensor_parallel=2", "expert_tensor_parallel=1")
    checkpoint = f"resume={two}/checkpoints/step=2"
    return {
        two: _train(folder, small_data, *layout, "run_dir=two", "stop_after=3", *WATCHED),
        one: _train(folder, small_data, "tensor_parallel=1", f"run_dir={one}", checkpoint),
    }


def _curves(runs: dict[str, str]) -> list[Curve]:
    return [read_curve(Path(folder)) for folder in runs]


def test_packs_give_the_same_loss_in_both_layouts(runs: dict[str, str]) -> None:
    two, one = _curves(runs)
    assert sorted(two.steps) == [1, 2, 3]
    assert sorted(one.steps) == [3, 4]
    assert one.losses[3] == pytest.approx(two.losses[3], rel=1e-5)
    assert one.steps[3]["grad_norm"] == pytest.approx(two.steps[3]["grad_norm"], rel=1e-4)


def test_what_is_shown_and_recorded(runs: dict[str, str]) -> None:
    (two, shown), (one, last) = runs.items()
    line = next(line for line in shown.splitlines() if line.startswith("step     2/4"))
    for part in (
        "loss ",
        "seq_load_balancing_loss ",
        "grad norm ",
        " tokens/s",
        " per rank",
        " GiB",
    ):
        assert part in line, line
    assert [event.kind for event in read_events(Path(two))] == [
        "started",
        "checkpoint",
        "checkpoint",
        "stopped",
    ]
    resumed, *_, finished = read_events(Path(one))
    assert (resumed.kind, resumed.step, resumed.details["ranks"]) == ("resumed", 2, 1)
    assert resumed.details["checkpoint"] == f"{two}/checkpoints/step=2"
    assert (finished.kind, finished.step) == ("finished", 4)
    assert resumed.details["pattern"] == "AEMR"
    assert resumed.details["layout"] == "TP=1 CP=1 EP=1 ETP=1 PP=1 (1 rank: DP=1, expert DP=1)"
    for record in read_curve(Path(one)).steps.values():
        assert record["tokens_per_second"] * record["seconds"] == pytest.approx(4 * 64)
        assert "mfu" not in record
        if "memory" in record:
            assert 0 < record["memory_added"] < record["memory"]
            assert 0 < record["seconds_fastest"] <= record["seconds_slowest"]
    assert "seconds_slowest" in read_curve(Path(one)).steps[3]  # the first of the session
    for text in ("stopped            two", "checkpoints saved  2", "  training ", " (start-up "):
        assert text in shown
    assert f"finished           {one}" in last
    summary = json.loads((Path(one) / "record" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["mfu"]) == ("finished", [3, 4], None)
    assert summary["startup_seconds"] > 0


def test_model_flops_are_those_of_the_plan_in_both_layouts(runs: dict[str, str]) -> None:
    recipe = resolve("nam56r_tiny", [f"{k}={v}" for k, v in SETTINGS.items()])
    job = Job({**recipe.model, "vocab_size": 300}, precision="fp32")
    chunks = [chunk for stage in build_stages(job) for chunk in stage.chunks]
    expected = step_operations(job.config(), chunks, 4 * 64)
    for curve, ranks in zip(_curves(runs), (2, 1), strict=True):
        for record in curve.steps.values():
            counted = record["tflops_per_rank"] * record["seconds"] * ranks * 1e12
            assert counted == pytest.approx(expected)


def test_tensorboard_has_the_speed(runs: dict[str, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for folder in runs:
        events = EventAccumulator(f"{folder}/tensorboard")
        events.Reload()
        curve = read_curve(Path(folder))
        for name in ("tokens_per_second", "tflops_per_rank"):
            logged = [event.value for event in events.Scalars(name)]
            recorded = [record[name] for record in curve.steps.values()]
            assert logged == pytest.approx(recorded, rel=1e-6)


def test_a_profile_of_the_chosen_steps_and_ranks(runs: dict[str, str]) -> None:
    two, one = map(Path, runs)
    (trace,) = (two / "profile").iterdir()
    assert trace.name == "rank1.json.gz"
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [str(event.get("name")) for event in events]
    assert len([name for name in names if name.startswith("ProfilerStep")]) == 2
    assert any(name.startswith("aten::") for name in names)
    assert not (one / "profile").exists()


def test_wandb_writes_into_the_run_folder_once(runs: dict[str, str]) -> None:
    two, _ = map(Path, runs)
    (offline,) = two.rglob("*.wandb")
    assert offline.parent.parent == two / "wandb"


def test_report_of_a_real_run(runs: dict[str, str]) -> None:
    two, one = map(Path, runs)
    assert [step for step, _ in read_run(two).checkpoints] == [2, 3]
    text = write_page(read_run(one)).read_text()
    for part in ("TP=1", "resumed", "finished", "<svg", "packed_documents: true"):
        assert part in text
