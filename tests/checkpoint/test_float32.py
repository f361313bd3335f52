"""A bfloat16 model's float32 parameters in a checkpoint: every bit, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from nemo_megacpp.checkpoint.dcp import save_model
from nemo_megacpp.checkpoint.optimizer_state import training_sharded_state_dict
from nemo_megacpp.checkpoint.safe_pickle import read_metadata
from nemo_megacpp.checkpoint.training_state import load_training_state, save_training_state
from nemo_megacpp.checkpoint.weights import load_weights
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.float32 import KeepsFloat32
from nemo_megacpp.proof.gather import gather_sharded
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import Trainee, prepare

MODEL = tiny_model("AEMR", mode="mamba3")
KEPT = ("layers.2.mixer.dt_bias", "layers.2.mixer.B_bias", "layers.3.mixer.A_log")


def _spec(sharded: bool) -> StepSpec:
    return StepSpec(MODEL, dtype="bfloat16", use_distributed_optimizer=sharded)


def _train(trainee: Trainee) -> None:
    trainee.forward_backward()
    trainee.optimizer.step()


def _bits(trainee: Trainee) -> list[bytes]:
    """This rank's parameters as they are in memory."""
    parameters = (p.detach() for chunk in trainee.chunks for p in chunk.parameters())
    return [p.contiguous().view(torch.uint8).numpy().tobytes() for p in parameters]


def _state(trainee: Trainee) -> dict[str, np.ndarray]:
    gathered = gather_sharded(training_sharded_state_dict(trainee.chunks, trainee.optimizer))
    return {} if gathered is None else gathered.values


def _save(layout: str, sharded: bool, folder: str) -> tuple[dict[str, np.ndarray], list[bytes]]:
    trainee = prepare(_spec(sharded), ParallelLayout.parse(layout))
    for _ in range(2):
        _train(trainee)
    save_training_state(trainee.chunks, trainee.optimizer, folder)
    state = _state(trainee)
    _train(trainee)
    return state, _bits(trainee)


def _load(layout: str, sharded: bool, folder: str) -> tuple[dict[str, np.ndarray], list[bytes]]:
    trainee = prepare(_spec(sharded), ParallelLayout.parse(layout))
    load_training_state(trainee.chunks, trainee.optimizer, folder)
    state = _state(trainee)
    _train(trainee)
    return state, _bits(trainee)


@pytest.mark.parametrize(
    ("sharded", "saved", "others"),
    [
        pytest.param(False, "tp=2,etp=1", ("pp=2", "world=2"), marks=pytest.mark.slow),
        (True, "world=2", ("tp=2,etp=1", "ep=2")),
    ],
)
def test_resume_bit_for_bit_and_reshard(
    ranks: WorkerPool, tmp_path: Path, sharded: bool, saved: str, others: tuple[str, ...]
) -> None:
    """The same layout goes on with the same bits; another layout, and the other kind of optimizer,
    has the same state."""
    folder = str(tmp_path / "state")
    before = ranks.run(2, _save, saved, sharded, folder)
    keys = read_metadata(Path(folder)).state_dict_metadata
    for name in KEPT:
        weight: Any = keys[f"decoder.{name}"]
        assert weight.properties.dtype == torch.float32
        assert f"optimizer.state.exp_avg.decoder.{name}" in keys
        assert f"optimizer.state.fp32_param.decoder.{name}" not in keys
    after = ranks.run(2, _load, saved, sharded, folder)
    assert [bits for _, bits in after] == [bits for _, bits in before]
    for layout in others:
        for kind in (False, True):
            state = ranks.run(2, _load, layout, kind, folder)[0][0]
            assert state.keys() == before[0][0].keys()
            wrong = [k for k, v in state.items() if not np.array_equal(v, before[0][0][k])]
            assert wrong == [], (layout, kind)


def _values(chunk: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().float().numpy() for name, p in chunk.named_parameters()}


def _save_as_before(folder: str, weights: str) -> dict[str, np.ndarray]:
    """Save as releases did whose mixers let ``Float16Module`` convert every parameter."""
    with mock.patch.object(KeepsFloat32, "_apply", torch.nn.Module._apply):
        trainee = prepare(_spec(False), ParallelLayout())
    assert {p.dtype for p in trainee.chunks[0].parameters()} == {torch.bfloat16}
    _train(trainee)
    save_training_state(trainee.chunks, trainee.optimizer, folder)
    save_model(trainee.chunks, weights)
    return _values(trainee.chunks[0])


def _load_old(folder: str, weights: str | None) -> dict[str, np.ndarray]:
    """Load the training state, or weights alone."""
    trainee = prepare(_spec(False), ParallelLayout())
    if weights is None:
        load_training_state(trainee.chunks, trainee.optimizer, folder)
    else:
        load_weights(trainee.chunks, weights)
    (chunk,) = trainee.chunks
    kept = {chunk.get_parameter(f"decoder.{name}").dtype for name in KEPT}
    assert kept == {torch.float32}
    return _values(chunk)


def test_bfloat16_values_of_older_checkpoints_load(ranks: WorkerPool, tmp_path: Path) -> None:
    places = (str(tmp_path / "state"), str(tmp_path / "weights"))
    saved = ranks.run(1, _save_as_before, *places)[0]
    for weights in (None, places[1]):
        loaded = ranks.run(1, _load_old, places[0], weights)[0]
        assert [n for n, value in saved.items() if not np.array_equal(value, loaded[n])] == []
