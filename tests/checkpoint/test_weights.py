"""The weights of every kind of checkpoint load into every layout, without an optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from nemo_megacpp.checkpoint.dcp import model_sharded_state_dict, save_sharded
from nemo_megacpp.checkpoint.weights import (
    WRAPPER,
    build_saved_model,
    load_weights,
    replace_prefix,
)
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.gather import gather_values
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import save_initial_weights

SPEC = StepSpec(tiny_model("AEMR"), dtype="float64")
LAYOUT = ParallelLayout.parse("tp=2,etp=1")

Values = dict[str, np.ndarray]


def _chunks(text: str, pattern: str = "AEMR", dtype: str = "float64") -> list[torch.nn.Module]:
    layout = ParallelLayout.parse(text)
    start_model_parallel(layout)
    model = {**tiny_model(pattern)}
    chunks = build_saved_model(model, layout, getattr(torch, dtype))[1]
    with torch.no_grad():
        for chunk in chunks:
            assert not chunk.training
            for parameter in chunk.parameters():
                parameter.fill_(1e9)
    return chunks


def save_as_nemo(source: str, out: str) -> None:
    """Save weights again under NeMo's names, with what else a run saves."""
    chunks = _chunks("tp=2,etp=1")
    load_weights(chunks, source)
    state = model_sharded_state_dict(chunks)
    moment = "optimizer.state.exp_avg.decoder.final_norm.weight"
    state["moment"] = ShardedTensor.from_rank_offsets(
        moment, torch.zeros(8), replica_id=torch.distributed.get_rank()
    )
    replace_prefix(state, "", WRAPPER)
    save_sharded(state, out)


def _loaded(text: str, folder: str, dtype: str = "float64") -> Values | None:
    chunks = _chunks(text, dtype=dtype)
    load_weights(chunks, folder)
    gathered = gather_values(chunks)
    return None if gathered is None else gathered.values


def _refusal(text: str, pattern: str, folder: str) -> str:
    chunks = _chunks(text, pattern)
    with pytest.raises(UserError) as refusal:
        load_weights(chunks, folder)
    assert all((p == 1e9).all() for chunk in chunks for p in chunk.parameters())
    return str(refusal.value)


@pytest.fixture(scope="module")
def saved(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Values]:
    """Noisy weights, saved at TP=2 in a folder ``bare`` and under NeMo's names in ``run``."""
    folder = tmp_path_factory.mktemp("weights")
    bare, weights = folder / "bare", folder / "run" / "weights"
    ranks.run(2, save_initial_weights, SPEC, LAYOUT, str(bare))
    ranks.run(2, save_as_nemo, str(bare), str(weights))
    values: Any = ranks.run(2, _loaded, "tp=2,etp=1", str(bare))[0]
    return folder, values


@pytest.mark.parametrize("text", ["tp=1", "pp=2", "tp=2,etp=2"])
def test_names_of_nemo_load_bit_for_bit(
    ranks: WorkerPool, saved: tuple[Path, Values], text: str
) -> None:
    folder, expected = saved
    world = ParallelLayout.parse(text).world
    values = ranks.run(world, _loaded, text, str(folder / "run"))[0]
    assert values.keys() == expected.keys()
    assert [key for key in expected if not np.array_equal(values[key], expected[key])] == []
    norm = expected["decoder.final_norm.weight"]
    assert norm.std() > 1e-3, "something is compared"


def test_another_dtype_is_rounded_once(ranks: WorkerPool, saved: tuple[Path, Values]) -> None:
    folder, expected = saved
    values = ranks.run(1, _loaded, "tp=1", str(folder / "run"), "float32")[0]
    wrong = [
        key
        for key in expected
        if not np.array_equal(values[key], expected[key].astype(values[key].dtype))
    ]
    assert wrong == []


@pytest.mark.parametrize("kind", ["bare", "run"])
def test_every_rank_names_what_differs(
    ranks: WorkerPool, saved: tuple[Path, Values], kind: str
) -> None:
    """In a pipeline, where each rank knows only the tensors of its stage."""
    folder, _ = saved
    first, second = ranks.run(2, _refusal, "pp=2", "AEMM", str(folder / kind))
    assert first == second
    assert f"{folder / kind} is a checkpoint of another model: it has no " in first
    for what in ("mixer.conv1d.bias.B, ", "it has also ", "it has another shape of ", " more;"):
        assert what in first, first
    assert "layers.3.mixer.D (48 there, 8 here)" in first
