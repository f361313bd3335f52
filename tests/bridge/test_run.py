"""Runs through Megatron-Bridge, in its own environment, and through NeMo, in this one.

One file, because a start takes most of the time: the run that is compared is also stopped, read and
resumed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.folder import complete_checkpoints
from nemo_megacpp.checkpoint.manifest import check_manifest
from nemo_megacpp.data.prepared import PreparedData
from tests.bridge.environment import bridge_python, command
from tests.path import NO_NEMO

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(NO_NEMO is not None, reason="compares with NeMo"),
]

STEPS = 10
SETTINGS = (
    "nam56r_tiny pattern=AEMR depth=4 tp=2 etp=1 seq_length=64 micro_batch_size=2 "
    "global_batch_size=4 lr=0.001 min_lr=0.0001 warmup_steps=2 log_interval=1 "
    f"max_steps={STEPS} save_interval=100 val_check_interval=20 limit_val_batches=1"
).split()
"""All families over two ranks, in float32."""


@dataclass(frozen=True)
class Runs:
    """What the runs left.

    Attributes:
        root: their folder: ``first``, ``nemo`` and ``bridge``.
        output: what the runs through Bridge printed.
    """

    root: Path
    output: str


@pytest.fixture(scope="module")
def runs(small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Train one step through NeMo, then ten from its weights through NeMo and through Bridge, where
    the run is stopped after six and resumed."""
    python, root = bridge_python(), tmp_path_factory.mktemp("bridge")
    settings = ["train", *SETTINGS, f"data={small_data.root}"]
    here = [sys.executable, *settings]
    there = [python, *settings, "--through", "bridge"]
    output = ""
    for words in (
        [*here, "stop_after=1", "run_dir=first"],
        [*here, "init_from=first", "run_dir=nemo"],
        [*there, "init_from=first", "run_dir=bridge", "stop_after=6"],
        [*there, "resume=auto", "run_dir=bridge"],
    ):
        done = command(*words, cwd=root)
        assert done.returncode == 0, done.stdout + done.stderr
        output += done.stdout if "bridge" in words else ""
    return Runs(root, output)


def _losses(run: Path) -> dict[int, float]:
    lines = (run / "record" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def test_the_losses_are_those_of_nemo(runs: Runs) -> None:
    """From the same weights, in float32: within 1e-5 in each of ten steps, resumption included."""
    nemo, bridge = _losses(runs.root / "nemo"), _losses(runs.root / "bridge")
    assert list(nemo) == list(bridge) == list(range(1, STEPS + 1))
    assert nemo[STEPS] < nemo[1] - 0.1, "a run that learns nothing compares nothing"
    assert bridge == pytest.approx(nemo, rel=0, abs=1e-5)


def test_the_checkpoints_are_complete_and_say_what_they_are(runs: Runs) -> None:
    found = complete_checkpoints(runs.root / "bridge" / "checkpoints")
    assert [step for step, _ in found] == [6, STEPS]
    path = found[-1][1]
    assert path.name == f"iter_{STEPS:07d}"
    assert "contents verified" in check_manifest(path)
    content = CheckpointContent(path)
    assert content.prefix == "" and content.step == STEPS
    assert content.identity is not None and content.identity["layout"] == "tp=2,sp=true,etp=1"
    assert content.optimizer_tensors


def test_what_the_host_supplies_is_said(runs: Runs) -> None:
    (line,) = {line for line in runs.output.splitlines() if "empty modules" in line}
    assert line.startswith("no-GPU host: Bridge imports megatron.energon")
