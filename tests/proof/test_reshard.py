"""A training state saved in one layout goes on in another: the same data, the same next step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from megatron.core import dist_checkpointing

from nemo_megacpp.checkpoint.dcp import fill_model, model_sharded_state_dict, save_sharded
from nemo_megacpp.checkpoint.training_state import load_training_state
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.cases import RESHARDINGS, SHARDED_RESHARDINGS, Place, tiny_model
from nemo_megacpp.proof.compare import FLOAT32, FLOAT64, Tolerances, compare
from nemo_megacpp.proof.reshard import Carried, load_and_step, save_after_steps
from nemo_megacpp.proof.step import StepSpec, prepare
from nemo_megacpp.runtime.workers import WorkerPool

Source = Callable[[StepSpec, str], tuple[str, Carried]]


@pytest.fixture(scope="module")
def source(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Return a function from a spec and a layout to a saved training state and what it was."""
    known: dict[str, tuple[str, Carried]] = {}

    def of(spec: StepSpec, text: str) -> tuple[str, Carried]:
        key = f"{spec} {text}"
        if key not in known:
            folder, layout = str(tmp_path_factory.mktemp("state")), ParallelLayout.parse(text)
            known[key] = (
                folder,
                ranks.run(layout.world, save_after_steps, spec, layout, folder)[0],
            )
        return known[key]

    return of


def _cases(reshardings: Any) -> list[Any]:
    return [
        pytest.param(model, saved, loaded, id=f"{label}: {saved} to {_name(loaded)}")
        for label, model, saved, targets in reshardings
        for loaded in targets
    ]


def _name(place: Place) -> str:
    return place if isinstance(place, str) else " ".join(place)


def _hold(
    ranks: WorkerPool,
    before: tuple[str, Carried],
    spec: StepSpec,
    place: Place,
    within: Tolerances,
    gradients: bool = True,
    steps: int = 1,
) -> Carried:
    """Load in ``place`` what was saved, and compare everything; the distributed optimizer has no
    gradients to compare with the plain one's."""
    text, pattern = (place, None) if isinstance(place, str) else place
    if pattern is not None:
        spec = dataclasses.replace(spec, model={**spec.model, "hybrid_pattern": pattern})
    folder, saved = before
    layout = ParallelLayout.parse(text)
    loaded: Carried = ranks.run(layout.world, load_and_step, spec, layout, folder)[0]
    assert loaded.steps == saved.steps == steps
    assert loaded.settings == saved.settings
    assert not any(loaded.state.replica_spread.values()), "replicas are equal"
    shared = saved.state.values.keys() & loaded.state.values.keys()
    assert [k for k in shared if not _same(saved.state.values[k], loaded.state.values[k])] == []
    assert saved.next_step is not None and loaded.next_step is not None
    rungs = compare(saved.next_step, loaded.next_step, within)
    broken = [r for r in rungs if not r.holds and (gradients or r.name != "gradients")]
    assert broken == []
    return loaded


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize(("model", "saved", "loaded"), _cases(RESHARDINGS))
def test_float64(
    ranks: WorkerPool, source: Source, model: dict[str, Any], saved: str, loaded: Place
) -> None:
    spec = StepSpec(model, objective="logits", dtype="float64")
    before = source(spec, saved)
    after = _hold(ranks, before, spec, loaded, FLOAT64)
    assert after.state.values.keys() == before[1].state.values.keys()


@pytest.mark.parametrize(("model", "saved", "loaded"), _cases(SHARDED_RESHARDINGS))
def test_distributed_optimizer(
    ranks: WorkerPool, source: Source, model: dict[str, Any], saved: str, loaded: Place
) -> None:
    """Through Megatron's cross entropy and gradient clipping, in float32."""
    spec = StepSpec(model, use_distributed_optimizer=True)
    before = source(spec, saved)
    after = _hold(ranks, before, spec, loaded, FLOAT32)
    assert after.state.values.keys() == before[1].state.values.keys()


def test_the_saved_moments_are_of_all_families(source: Source) -> None:
    """What is carried is something: moments of every family, none of them zero."""
    spec = StepSpec(tiny_model("AEMR"), use_distributed_optimizer=True)
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
    spec = StepSpec(tiny_model("AEMR"), use_distributed_optimizer=sharded)
    folder, carried = source(spec, saved)
    other = dataclasses.replace(spec, use_distributed_optimizer=not sharded)
    after = _hold(ranks, (folder, carried), other, "world=2", FLOAT32, gradients=False)
    assert after.state.values.keys() == carried.state.values.keys()


@pytest.mark.parametrize("sharded", [False, True])
def test_before_the_first_step(ranks: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    """A run that is stopped at once has moments too: zeros, after no step."""
    spec = StepSpec(tiny_model("AEMR"), use_distributed_optimizer=sharded)
    folder, layout = str(tmp_path / "state"), ParallelLayout.parse("pp=2")
    carried: Carried = ranks.run(2, save_after_steps, spec, layout, folder, 0)[0]
    _hold(ranks, (folder, carried), spec, "world=2", FLOAT32, steps=0)


def _load_weights_only(spec: StepSpec, layout: ParallelLayout, folder: str) -> Any:
    def load(chunks: Any, optimizer: Any, directory: str) -> None:
        state = {"model": model_sharded_state_dict(chunks)}
        fill_model(chunks, dist_checkpointing.load(state, directory)["model"])

    with mock.patch("nemo_megacpp.proof.reshard.load_training_state", load):
        return load_and_step(spec, layout, folder)


def test_lost_moments_are_seen(ranks: WorkerPool, source: Source) -> None:
    """The comparison can fail: without the optimizer's state the next step is another one."""
    spec = StepSpec(tiny_model("AEMR"), objective="logits", dtype="float64")
    folder, saved = source(spec, "tp=2,etp=1")
    lost: Carried = ranks.run(2, _load_weights_only, spec, ParallelLayout.parse("pp=2"), folder)[0]
    assert saved.next_step is not None and lost.next_step is not None
    broken = [r.name for r in compare(saved.next_step, lost.next_step, FLOAT64) if not r.holds]
    assert broken == ["step"]


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
    assert "Load its weights alone" in message
