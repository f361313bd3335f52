"""A run saved in one layout goes on in another: the same data, the same next step.

Saved and resumed by what runs use: NeMo's trainer, our checkpoint callback, strategy and optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from nemo_megacpp.checkpoint.dcp import model_sharded_state_dict, save_sharded
from nemo_megacpp.checkpoint.training_state import load_training_state
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.checks import FLOAT32, FLOAT64, Limits, compare
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_result import Carried, StepResult, checkpoint_of
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import prepare
from tests.path import LOADS_OPTIMIZER, resume_and_train, train_and_save
from tests.proof.cases import RESHARDINGS, SHARDED_RESHARDINGS, Place
from tests.selection import slow_if

Source = Callable[[StepSpec, str], tuple[str, Carried]]


@pytest.fixture(scope="module")
def source(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Return a function from a spec of two steps and a layout to the checkpoint after the first and
    the state that it holds."""
    known: dict[str, tuple[str, Carried]] = {}

    def of(spec: StepSpec, text: str) -> tuple[str, Carried]:
        key = f"{spec} {text}"
        if key not in known:
            run_dir, layout = str(tmp_path_factory.mktemp("run")), ParallelLayout.parse(text)
            carried: Carried = ranks.run(layout.world, train_and_save, spec, layout, run_dir, 1)[0]
            known[key] = checkpoint_of(run_dir, 1), carried
        return known[key]

    return of


def _cases(reshardings: Any) -> list[Any]:
    """Return every source in every target; all but the first of every third one are slow."""
    return [
        pytest.param(
            model,
            saved,
            loaded,
            id=f"{label}: {saved} to {_name(loaded)}",
            marks=slow_if(index > 0 or (number % 3 > 0 and label != "prediction")),
        )
        for number, (label, model, saved, targets) in enumerate(reshardings)
        for index, loaded in enumerate(targets)
    ]


def _name(place: Place) -> str:
    return place if isinstance(place, str) else " ".join(place)


def _next_step(carried: Carried, after: int) -> StepResult:
    """Return what the second step gave, of a run of both or of that one only."""
    step = carried.following
    assert step is not None
    gradients = step.gradients
    if after == 0 or len(step.losses) == 2:
        suffix = "@2"
        gradients = dataclasses.replace(
            gradients,
            values={
                key.removesuffix(suffix): value
                for key, value in gradients.values.items()
                if key.endswith(suffix)
            },
        )
    aux = {name: value for name, value in step.aux_losses.items() if name.endswith("@2")}
    return dataclasses.replace(
        step,
        losses=step.losses[-1:],
        grad_norms=step.grad_norms[-1:],
        aux_losses=aux,
        gradients=gradients,
    )


def _hold(
    ranks: WorkerPool,
    before: tuple[str, Carried],
    spec: StepSpec,
    place: Place,
    within: Limits,
    after: int = 1,
) -> Carried:
    """Resume in ``place`` what was saved, and compare everything."""
    text, pattern = (place, None) if isinstance(place, str) else place
    if pattern is not None:
        spec = dataclasses.replace(spec, model={**spec.model, "hybrid_pattern": pattern})
    checkpoint, saved = before
    layout = ParallelLayout.parse(text)
    loaded: Carried = ranks.run(layout.world, resume_and_train, spec, layout, checkpoint, after)[0]
    assert loaded.steps == saved.steps == after
    assert loaded.settings == saved.settings
    assert not any(loaded.state.replica_spread.values()), "replicas are equal"
    shared = saved.state.values.keys() & loaded.state.values.keys()
    assert [k for k in shared if not _same(saved.state.values[k], loaded.state.values[k])] == []
    checks = compare(_next_step(saved, after), _next_step(loaded, after), within)
    assert [check for check in checks if not check.passed] == []
    return loaded


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize(("model", "saved", "loaded"), _cases(RESHARDINGS))
def test_float64(
    ranks: WorkerPool, source: Source, model: dict[str, Any], saved: str, loaded: Place
) -> None:
    spec = StepSpec(model, objective="logits", dtype="float64", steps=2)
    before = source(spec, saved)
    after = _hold(ranks, before, spec, loaded, FLOAT64)
    assert after.state.values.keys() == before[1].state.values.keys()


@pytest.mark.parametrize(("model", "saved", "loaded"), _cases(SHARDED_RESHARDINGS))
def test_distributed_optimizer(
    ranks: WorkerPool, source: Source, model: dict[str, Any], saved: str, loaded: Place
) -> None:
    """Through Megatron's cross entropy and gradient clipping, in float32."""
    spec = StepSpec(model, use_distributed_optimizer=True, steps=2)
    before = source(spec, saved)
    after = _hold(ranks, before, spec, loaded, FLOAT32)
    assert after.state.values.keys() == before[1].state.values.keys()


def test_the_saved_moments_are_of_all_families(source: Source) -> None:
    """What is carried is something: moments of every family, none of them zero."""
    spec = StepSpec(tiny_model("AEMR"), use_distributed_optimizer=True, steps=2)
    _, saved = source(spec, "world=4,tp=2,etp=1")
    for moment in ("exp_avg", "exp_avg_sq"):
        for key in (
            "layers.0.self_attention.linear_qkv.weight",
            "layers.1.mlp.experts",
            "layers.2.mixer.in_proj",
            "layers.2.mixer.conv1d",
            "layers.3.mixer.in_proj.shared_weight",
        ):
            found = [v for k, v in saved.state.values.items() if f"{moment}.decoder.{key}" in k]
            assert found and all(value.any() for value in found), (moment, key)


@pytest.mark.parametrize(("sharded", "saved"), [(True, "world=4,tp=2,etp=1"), (False, "pp=2")])
def test_the_kind_of_optimizer_may_change(
    ranks: WorkerPool, source: Source, sharded: bool, saved: str
) -> None:
    """From the distributed optimizer to the plain one, and from that to the distributed."""
    spec = StepSpec(tiny_model("AEMR"), use_distributed_optimizer=sharded, steps=2)
    before = source(spec, saved)
    other = dataclasses.replace(spec, use_distributed_optimizer=not sharded)
    after = _hold(ranks, before, other, "world=2", FLOAT32)
    assert after.state.values.keys() == before[1].state.values.keys()


@pytest.mark.parametrize("sharded", [False, True])
def test_before_the_first_step(ranks: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    """A run that is stopped at once has moments too: zeros, after no step."""
    spec = StepSpec(tiny_model("AEMR"), use_distributed_optimizer=sharded, steps=2)
    run_dir, layout = str(tmp_path), ParallelLayout.parse("pp=2")
    carried: Carried = ranks.run(2, train_and_save, spec, layout, run_dir, 0)[0]
    _hold(ranks, (checkpoint_of(run_dir, 0), carried), spec, "world=2", FLOAT32, after=0)


def _resume_without_moments(spec: StepSpec, layout: ParallelLayout, checkpoint: str) -> Any:
    with mock.patch(f"{LOADS_OPTIMIZER}.load_optimizer_state_dict", lambda *_: None):
        return resume_and_train(spec, layout, checkpoint, 1)


def test_lost_moments_are_seen(ranks: WorkerPool, source: Source) -> None:
    """The comparison can fail: without the optimizer's state the next step is another one."""
    spec = StepSpec(tiny_model("AEMR"), objective="logits", dtype="float64", steps=2)
    checkpoint, saved = source(spec, "tp=2,etp=1")
    place = ParallelLayout.parse("pp=2")
    lost: Carried = ranks.run(2, _resume_without_moments, spec, place, checkpoint)[0]
    checks = compare(_next_step(saved, 1), _next_step(lost, 1), FLOAT64)
    assert [check.name for check in checks if not check.passed] == ["step"]


def _load_foreign(layout: ParallelLayout, spec: StepSpec, folder: str, metadata: Any) -> str:
    trainee = prepare(spec, layout)
    state = {"model": model_sharded_state_dict(trainee.chunks)}
    save_sharded(state, folder, metadata)
    with pytest.raises(UserError) as refused:
        load_training_state(trainee.chunks, trainee.optimizer, folder)
    return str(refused.value)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (
            {"distrib_optim_sharding_type": "dp_reshardable"},
            "(dp_reshardable: only the degrees it was saved with",
        ),
        ({}, "(without the distributed optimizer)"),
    ],
)
def test_other_forms_are_refused(
    ranks: WorkerPool, tmp_path: Path, metadata: dict[str, Any], says: str
) -> None:
    spec = StepSpec(tiny_model("A"), use_distributed_optimizer=True)
    folder = str(tmp_path / "foreign")
    message = ranks.run(1, _load_foreign, ParallelLayout(), spec, folder, metadata)[0]
    assert says in message
    assert "Start a new run from its weights with init_from=CHECKPOINT" in message
