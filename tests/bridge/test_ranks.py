"""Runs through Megatron-Bridge in the layouts and with the settings that its door accepts.

All start from the weights of one run, in float32, and are compared with one rank. They run in
Bridge's environment (``make test-bridge``), in ranks that have imported Bridge once; that Bridge's
losses are those of NeMo is in ``test_run.py``.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_megacpp.bridge.versions import describe_mismatch
from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.folder import complete_checkpoints
from nemo_megacpp.data.prepare import prepare
from nemo_megacpp.runs.curves import Curve, read_curve
from nemo_megacpp.runs.events import read_events
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool

NO_BRIDGE = describe_mismatch()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NO_BRIDGE is not None, reason=f"Bridge's environment: {NO_BRIDGE}"),
]

STEPS = 4
CHANNEL = {"name": "language", "vocab_size": 5, "field": "lang"}
SETTINGS = {
    **{"pattern": "AEMR", "depth": 4, "hidden_size": 56, "seq_length": 32},
    **{"make_vocab_size_divisible_by": 70, "tp": 1, "etp": 1},
    **{"micro_batch_size": 1, "global_batch_size": 4, "max_steps": STEPS, "warmup_steps": 1},
    **{"lr": 0.001, "min_lr": 0.0001, "log_interval": 1, "save_interval": 100},
    **{"val_check_interval": 2, "limit_val_batches": 2},
    **{"tensorboard": "false", "heartbeat_timeout_minutes": "null"},
}

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bridge")


@pytest.fixture(scope="module")
def data(folder: Path) -> tuple[Path, Path]:
    """Two folders of prepared data with a side channel, of one tokenizer; documents have multiples
    of four tokens, so that CP=2 can split them."""
    source = {key: CHANNEL[key] for key in ("name", "vocab_size", "field")}
    found: list[Path] = []
    for part in ("a", "b"):
        lines = [
            {"text": f"word{n} and {n % 7} {part}s for a start\n" * 6, "lang": n % 5}
            for n in range(40)
        ]
        texts = folder / f"{part}.jsonl"
        texts.write_text("\n".join(map(json.dumps, lines)))
        options: dict[str, Any] = (
            {"vocab_size": 280} if not found else {"tokenizer": found[0] / "tokenizer"}
        )
        options |= {"held_out": 0.3, "document_multiple": 4, "progress": False}
        out = folder / f"data-{part}"
        prepare([texts], out, side_channels=[source], **options)
        found.append(out)
    return found[0], found[1]


@pytest.fixture(scope="module")
def train(ranks: WorkerPool, folder: Path, data: tuple[Path, Path]) -> Train:
    """Return a function that trains on a number of ranks; a run is named by its folder."""
    from tests.bridge import bridge_ranks

    def run(name: str, world: int = 1, *hook: Any, **settings: Any) -> Path:
        given = {**SETTINGS, "data": data[0], **settings, "run_dir": folder / name}
        overrides = [f"{key}={value}" for key, value in given.items()]
        ranks.run(world, bridge_ranks.run_train, overrides, *hook)
        return folder / name

    return run


@pytest.fixture(scope="module")
def first(train: Train) -> Path:
    """A run that stopped after its first step: weights for the others."""
    return train("first", stop_after=1)


@pytest.fixture(scope="module")
def one(train: Train, first: Path) -> Path:
    """The run on one rank that others are compared with."""
    settings = {"save_interval": 1, "keep_latest": 1, "keep_every": 2, "tensorboard": "true"}
    if importlib.util.find_spec("wandb") is not None:
        settings |= {"wandb_project": "tests", "wandb_name": "named"}
    return train("one", init_from=first, **settings)


def _hold(run: Path, reference: Path, steps: int = STEPS) -> Curve:
    """Compare losses, gradient norms, learning rates and evaluations with another run's."""
    found, expected = read_curve(run), read_curve(reference)
    assert sorted(found.steps) == list(range(1, steps + 1))
    for step, record in found.steps.items():
        other = expected.steps[step]
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5), step
        assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), step
        assert record["lr"] == other["lr"], step
        assert record["aux"] == pytest.approx(other["aux"], rel=1e-5), step
    held = {step: loss for step, loss in expected.heldout.items() if step <= steps}
    assert found.heldout == pytest.approx(held, rel=1e-5)
    return found


def _kinds(run: Path) -> list[tuple[str, int]]:
    return [(event.kind, event.step) for event in read_events(run)]


def _steps(run: Path) -> list[int]:
    return [step for step, _ in complete_checkpoints(run / "checkpoints")]


LAYOUTS = {
    "cp=2": {"cp": 2},
    "tp=2,cp=2": {"tp": 2, "cp": 2},
    "tp=2,ep=2,etp=2": {"tp": 2, "ep": 2, "etp": 2},
    "tp=2,ep=2": {"tp": 2, "ep": 2},
    "pp=2,vpp=2": {"pp": 2, "vpp": 2},
    "tp=2,pp=2": {"tp": 2, "pp": 2},
}
_WORLD = {"cp=2": 2, "pp=2,vpp=2": 2, "tp=2,ep=2": 2}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_numbers_of_one_rank(
    train: Train, first: Path, one: Path, layout: str
) -> None:
    """Four steps and two evaluations of all families, from the same weights."""
    world = _WORLD.get(layout, 4)
    _hold(train(layout.replace(",", "-"), world, init_from=first, **LAYOUTS[layout]), one)


def test_depth_state_crosses_a_cut(train: Train) -> None:
    """Beside the hidden states, in messages whose shape is sent before them."""
    settings: dict[str, Any] = {"pattern": "RAER", "m2rnn_depth_state": "true"}
    settings["init_from"] = train("depth-first", **settings, stop_after=1)
    _hold(train("depth-cut", 2, **settings, pp=2), train("depth", **settings))


def test_prediction_depths(train: Train) -> None:
    """Their losses are recorded by the run, and a run goes on in another layout."""
    settings: dict[str, Any] = {"pattern": "AEMR/EAMR/EAMR", "mtp_loss_scaling_factor": 0.5}
    settings["init_from"] = train("depths-first", **settings, stop_after=1)
    one = train("depths", **settings)
    first = read_curve(one).steps[1]
    assert first["aux"]["mtp_1"] != pytest.approx(first["aux"]["mtp_2"], rel=1e-5)
    assert first["aux"]["mtp_2"] == pytest.approx(first["loss"], rel=0.05), "barely trained"
    _hold(train("depths-tp2-pp2", 4, **settings, tp=2, pp=2, stop_after=2), one, steps=2)
    _hold(train("depths-tp2-pp2", 2, **settings, cp=2, resume="auto"), one)


def test_what_a_run_leaves(one: Path) -> None:
    """Its record, the checkpoints that it keeps, and what its loggers got."""
    curve = read_curve(one)
    assert sorted(curve.heldout) == [2, STEPS], "after two steps, and not once more at the end"
    saved = [("checkpoint", step) for step in range(1, STEPS + 1)]
    assert _kinds(one) == [("started", 0), *saved, ("finished", STEPS)]
    assert _steps(one) == [2, STEPS]  # multiples of keep_every, and the newest
    (events,) = (one / "tensorboard").glob("events*")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = EventAccumulator(str(events))
    scalars.Reload()
    logged = {event.step: event.value for event in scalars.Scalars("lm loss")}
    assert logged == pytest.approx(curve.losses, rel=1e-6)
    heldout = {event.step: event.value for event in scalars.Scalars("lm loss validation")}
    assert heldout == pytest.approx(curve.heldout, rel=1e-6)
    if importlib.util.find_spec("wandb") is not None:
        (run,) = (one / "wandb").glob("offline-run-*")
        assert list(run.glob("run-*.wandb"))


def test_packs_side_channels_and_blends(train: Train, data: tuple[Path, Path]) -> None:
    """A blend of packed documents with a side channel, in Mamba-3, whose packs CP can split without
    Transformer Engine."""
    blend = json.dumps({str(path): weight for path, weight in zip(data, (0.7, 0.3), strict=True)})
    settings = {"mode": "mamba3", "side_channels": json.dumps([CHANNEL])}
    settings["init_from"] = train("blend-first", **settings, stop_after=1)
    settings |= {"data": blend, "packed_documents": "true"}
    _hold(train("blend-in", 4, **settings, tp=2, cp=2), train("blend", **settings))


def test_new_side_channels_are_initialized_where_asked(train: Train, first: Path) -> None:
    """Weights of a model without them are refused otherwise."""
    settings = {"side_channels": json.dumps([CHANNEL]), "init_from": first, "stop_after": 1}
    with pytest.raises(WorkerError) as refused:
        train("same", **settings)
    assert "the side channels are none there" in str(refused.value.refusal)
    run = train("any", **settings, init_side_channels="any")
    (path,) = [path for _, path in complete_checkpoints(run / "checkpoints")]
    assert any("side_channels" in name for name in CheckpointContent(path).tensors)


def test_sigterm_saves_and_the_run_goes_on(train: Train, first: Path, one: Path) -> None:
    """It reaches another rank than the one that records, in a step and then in an evaluation."""
    from tests.bridge import bridge_ranks

    layout = {"tp": 2, "init_from": first}
    hook = (bridge_ranks.sigterm, "on_train_step_end", 1, 0)
    run = train("sigterm", 2, *hook, **layout)
    assert _kinds(run) == [("started", 0), ("sigterm", 1), ("checkpoint", 1), ("stopped", 1)]
    hook = (bridge_ranks.sigterm, "on_eval_step_end", 1, 2)
    train("sigterm", 2, *hook, **layout, resume="auto")
    after = [("resumed", 1), ("sigterm", 2), ("checkpoint", 2), ("stopped", 2)]
    assert _kinds(run)[4:] == after
    assert not read_curve(run).heldout, "the loss of a part of the data is none"
    train("sigterm", 1, resume="auto")
    expected = read_curve(one)
    found = read_curve(run)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.heldout == pytest.approx({STEPS: expected.heldout[STEPS]}, rel=1e-5)


def test_nan_ends_the_run_before_it_saves(train: Train, first: Path) -> None:
    from tests.bridge import bridge_ranks

    hook = (bridge_ranks.nan_loss, 1, 5)  # of four rows, two microbatches a step on each rank
    with pytest.raises(WorkerError) as ended:
        train("nan", 2, *hook, init_from=first, save_interval=1, val_check_interval=100)
    assert "Step 3: the gradient is NaN on rank 1. The run stops" in str(ended.value.refusal)
    run = first.parent / "nan"
    assert _steps(run) == [1, 2]
    assert sorted(read_curve(run).steps) == [1, 2]
    assert not [event for event in read_events(run) if event.kind in ("stopped", "finished")]


def test_what_ends_a_run_is_recorded(train: Train, first: Path) -> None:
    from tests.bridge import bridge_ranks

    with pytest.raises(WorkerError, match="SystemExit: 130"):
        train("interrupted", 1, bridge_ranks.interrupt, 1, init_from=first, save_interval=1)
    run = first.parent / "interrupted"
    assert _kinds(run) == [("started", 0), ("checkpoint", 1), ("failed", 2)]
    assert read_events(run)[-1].details == {"reason": "KeyboardInterrupt"}


def test_another_batch_size_reads_on_where_the_run_stopped(
    train: Train, first: Path, folder: Path
) -> None:
    """Two steps of four rows, then two of two: rows 9 to 12, and not 5 to 8."""
    from tests.bridge import bridge_ranks

    def rows(name: str, *words: Any, **settings: Any) -> list[str]:
        file = folder / f"{name}.rows"
        train(name, 1, bridge_ranks.note_rows, str(file), *words, init_from=first, **settings)
        return file.read_text().splitlines()

    quiet = {"val_check_interval": 100}
    all_rows = rows("same-size", **quiet)[: 4 * STEPS]  # then those of the evaluation at the end
    assert list(read_curve(folder / "same-size").heldout) == [STEPS]
    assert len(all_rows) == len(set(all_rows)) == 4 * STEPS
    train("other-size", stop_after=2, init_from=first, **quiet)
    assert CheckpointContent(folder / "other-size").consumed_samples == 8
    read_on = rows("other-size", resume="auto", global_batch_size=2, **quiet)
    assert read_on[:4] == all_rows[8:12]
    (checkpoint,) = [
        p for s, p in complete_checkpoints(folder / "other-size/checkpoints") if s == 4
    ]
    assert CheckpointContent(checkpoint).consumed_samples == 12


def test_dropout_goes_on_with_its_random_numbers(train: Train, first: Path) -> None:
    """A resumed run repeats an uninterrupted one bit by bit."""
    settings = {"hidden_dropout": 0.1, "init_from": first, "tp": 2}
    whole = read_curve(train("dropout", 2, **settings))
    train("dropout-cut", 2, **settings, stop_after=3)
    cut = read_curve(train("dropout-cut", 2, **settings, resume="auto"))
    assert cut.losses == whole.losses
