"""One training over both doors: NeMo in this environment, Megatron-Bridge in its own.

One file and six runs, because a start takes most of the time: NeMo trains ten steps; Bridge
resumes its third step in another layout, and is itself stopped and resumed; NeMo resumes Bridge's
eighth; and each begins a new run from the other's weights of step 6. The data are a blend of packed
documents with a side channel, in float32.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.folder import complete_checkpoints
from nemo_megacpp.checkpoint.manifest import check_manifest
from nemo_megacpp.data.prepare import prepare
from nemo_megacpp.runs.curves import Curve, read_curve
from nemo_megacpp.runs.events import read_events
from tests.bridge.environment import bridge_python, command
from tests.path import NO_NEMO

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(NO_NEMO is not None, reason="compares with NeMo"),
]

STEPS = 10
CHANNEL = {"name": "bigram", "vocab_size": 64, "ngram": 2}
SETTINGS = (
    "nam56r_tiny pattern=AEMR depth=4 etp=1 seq_length=64 micro_batch_size=1 "
    "global_batch_size=4 packed_documents=true lr=0.001 min_lr=0.0001 warmup_steps=2 "
    f"log_interval=1 max_steps={STEPS} save_interval=3 val_check_interval=4 limit_val_batches=1 "
    "tensorboard=false"
).split()


@dataclass(frozen=True)
class Runs:
    """What the runs left.

    Attributes:
        root: their folder: ``nemo``, ``bridge``, ``back``, ``new-nemo`` and ``new-bridge``.
        output: what the runs through Bridge printed.
    """

    root: Path
    output: str


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two folders of prepared data, of one tokenizer, as the setting ``data``."""
    folder, tokenizer = tmp_path_factory.mktemp("blend"), None
    weights: dict[str, float] = {}
    for part, weight in (("a", 0.7), ("b", 0.3)):
        lines = (
            json.dumps({"text": f"word{number} and {number % 7} {part}s for a start\n" * 6})
            for number in range(100)
        )
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
        known: dict[str, Any] = {"tokenizer": tokenizer} if tokenizer else {"vocab_size": 300}
        prepare(
            [folder / f"{part}.jsonl"],
            folder / part,
            side_channels=[CHANNEL],
            held_out=0.3,
            progress=False,
            **known,
        )
        weights[str(folder / part)] = weight
        tokenizer = tokenizer or folder / part / "tokenizer"
    return json.dumps(weights)


@pytest.fixture(scope="module")
def runs(blend: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    python, root = bridge_python(), tmp_path_factory.mktemp("bridge")
    settings = [*SETTINGS, f"data={blend}", f"side_channels={json.dumps([CHANNEL])}"]
    here = [sys.executable, "train", *settings]
    there = [python, "train", *settings, "--through", "bridge"]
    output, third, sixth = "", "nemo/checkpoints/step=3", "bridge/checkpoints/iter_0000006"
    for words in (
        [*here, "run_dir=nemo", "tp=2"],
        [
            *there,
            "run_dir=bridge",
            "tp=2",
            "pp=2",
            f"resume={third}",
            "stop_after=6",
        ],
        [*there, "run_dir=bridge", "tp=1", "pp=2", "resume=auto", "stop_after=8"],
        [*here, "run_dir=back", "tp=2", "resume=bridge"],
        [*here, "run_dir=new-nemo", "tp=2", f"init_from={sixth}", "stop_after=1"],
        [*there, "run_dir=new-bridge", "tp=2", "init_from=nemo/checkpoints/step=6", "stop_after=1"],
    ):
        done = command(*words, cwd=root)
        assert done.returncode == 0, done.stdout + done.stderr
        output += done.stdout if "bridge" in words else ""
    return Runs(root, output)


def _hold(found: Curve, nemo: Curve, steps: range) -> None:
    assert sorted(found.steps) == list(steps)
    for step in steps:
        here, there = found.steps[step], nemo.steps[step]
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-6), step
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-5), step
        assert here["lr"] == there["lr"], step
        assert here["aux"] == pytest.approx(there["aux"], rel=1e-5), step


def test_bridge_goes_on_where_nemo_has_saved(runs: Runs) -> None:
    """Five steps and two evaluations, in two layouts."""
    nemo, bridge = (read_curve(runs.root / name) for name in ("nemo", "bridge"))
    assert nemo.losses[STEPS] < nemo.losses[1] - 0.1, "a run that learns nothing compares nothing"
    _hold(bridge, nemo, range(4, 9))
    expected = {step: nemo.heldout[step] for step in (4, 8)}
    assert bridge.heldout == pytest.approx(expected, rel=1e-6)


def test_nemo_goes_on_where_bridge_has_saved(runs: Runs) -> None:
    nemo, back = (read_curve(runs.root / name) for name in ("nemo", "back"))
    _hold(back, nemo, range(9, STEPS + 1))


def test_a_new_run_begins_from_the_weights_of_either_door(runs: Runs) -> None:
    """Those of step 6 are the same in both runs, whose losses up to there are."""
    nemo, bridge = (read_curve(runs.root / f"new-{name}").losses[1] for name in ("nemo", "bridge"))
    assert nemo == pytest.approx(bridge, rel=1e-6)
    assert nemo < 4, "the weights of a first step would give 5.9"


def test_both_doors_leave_the_same_record(runs: Runs) -> None:
    def said(name: str) -> list[tuple[str, int, set[str]]]:
        events = read_events(runs.root / name)
        return [(event.kind, event.step, set(event.details) - {"through"}) for event in events]

    begun = {"pattern", "layout", "ranks", "max_steps", "startup_seconds"}
    resumed = {*begun, "checkpoint"}
    assert said("bridge") == [
        ("resumed", 3, resumed),
        ("checkpoint", 6, {"path"}),
        ("stopped", 6, set()),
        ("resumed", 6, resumed),
        ("checkpoint", 8, {"path"}),
        ("stopped", 8, set()),
    ]
    saved = [("checkpoint", step, {"path"}) for step in (3, 6, 9, STEPS)]
    assert said("nemo") == [("started", 0, begun), *saved, ("finished", STEPS, set())]
    assert said("back") == [("resumed", 8, resumed), *saved[2:], ("finished", STEPS, set())]
    nemo, bridge = (set(read_curve(runs.root / name).steps[8]) for name in ("nemo", "bridge"))
    assert nemo == bridge


def test_the_checkpoints_are_complete_and_say_what_they_are(runs: Runs) -> None:
    found = complete_checkpoints(runs.root / "bridge" / "checkpoints")
    assert [step for step, _ in found] == [6, 8]
    path = found[-1][1]
    assert path.name == "iter_0000008"
    assert "contents verified" in check_manifest(path)
    content = CheckpointContent(path)
    assert content.prefix == "" and content.step == 8
    assert content.identity is not None and content.identity["layout"] == "pp=2,etp=1"
    assert content.optimizer_tensors
    of_nemo = CheckpointContent(runs.root / "nemo" / "checkpoints" / "step=9")
    assert (content.consumed_samples, of_nemo.consumed_samples) == (32, 36)


def test_what_the_host_supplies_is_said(runs: Runs) -> None:
    (line,) = {line for line in runs.output.splitlines() if "empty modules" in line}
    assert line.startswith("no-GPU host: Bridge imports megatron.energon")
