"""What a resumed optimizer takes from the checkpoint, and what from the run's own settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nemo_megacpp.checkpoint.training_state import load_training_state, save_training_state
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import prepare


def _save(spec: StepSpec, folder: str) -> None:
    trainee = prepare(spec, ParallelLayout())
    trainee.forward_backward()
    trainee.optimizer.step()
    save_training_state(trainee.chunks, trainee.optimizer, folder)


def _load(spec: StepSpec, folder: str) -> set[tuple[float, float]]:
    """Return the peak of the schedule and the rate of each group."""
    trainee = prepare(spec, ParallelLayout())
    load_training_state(trainee.chunks, trainee.optimizer, folder)
    return {(group["max_lr"], group["lr"]) for group in trainee.optimizer.param_groups}


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "distributed"])
def test_the_schedule_is_that_of_the_run(ranks: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    """Its scheduler sets the rate of the next step from the peak of each group."""
    spec = StepSpec(tiny_model("AE"), learning_rate=1e-2, use_distributed_optimizer=sharded)
    ranks.run(1, _save, spec, str(tmp_path))
    other = dataclasses.replace(spec, learning_rate=5e-3)
    found = ranks.run(1, _load, other, str(tmp_path))[0]
    assert found == {(5e-3, 1e-2)}
