"""Weights saved in one layout and loaded in another are the same, bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_megacpp.checkpoint.dcp import require_psutil, save_model
from nemo_megacpp.checkpoint.weights import load_weights
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.gather import gather_values
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import build_chunks, make_config, save_initial_weights

SPEC = StepSpec(tiny_model("AEMR"), dtype="float64")

Values = dict[str, np.ndarray]


def _loaded(text: str, folder: str) -> tuple[Values, dict[str, float]] | None:
    """Fill a model with what it cannot have by chance, load it, and gather it on rank 0."""
    layout = ParallelLayout.parse(text)
    start_model_parallel(layout)
    chunks = build_chunks(make_config(SPEC, layout), layout)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(1e9)
    load_weights(chunks, folder)
    gathered = gather_values(chunks)
    return None if gathered is None else (gathered.values, gathered.replica_spread)


@pytest.fixture(scope="module")
def saved(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Values]:
    """Noisy weights, saved at TP=2 with whole experts, and what they are in global shape."""
    folder = str(tmp_path_factory.mktemp("weights"))
    ranks.run(2, save_initial_weights, SPEC, ParallelLayout.parse("tp=2,etp=1"), folder)
    loaded: Any = ranks.run(2, _loaded, "tp=2,etp=1", folder)[0]
    return folder, loaded[0]


def test_the_saved_weights_are_noise_of_all_families(saved: tuple[str, Values]) -> None:
    """What follows compares something: nothing is constant, and every family is there."""
    _, values = saved
    for key in (
        "layers.0.self_attention.linear_qkv.weight",
        "layers.1.mlp.router.weight",
        "layers.1.mlp.experts",
        "layers.2.mixer.in_proj",
        "layers.3.mixer.state_weight",
        "layers.3.mixer.in_proj.shared_weight",
    ):
        assert any(key in name for name in values), (key, sorted(values))
    for name, value in values.items():
        if "expert_bias" not in name and value.dtype == np.float64:
            assert value.std() > 1e-3, name
            assert abs(value).max() < 1e3, name


@pytest.mark.parametrize("text", ["tp=1", "pp=2", "ep=2", "pp=2,ep=2", "tp=2,etp=2"])
def test_loads_bit_for_bit(ranks: WorkerPool, saved: tuple[str, Values], text: str) -> None:
    folder, expected = saved
    values, spread = ranks.run(ParallelLayout.parse(text).world, _loaded, text, folder)[0]
    assert values.keys() == expected.keys()
    different = [key for key in expected if not np.array_equal(values[key], expected[key])]
    assert not different
    assert not any(spread.values()), "replicas are equal"


def test_psutil_missing_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before anything is written, and before any collective: there is no process group here."""
    require_psutil()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "psutil" else find_spec(name, package),
    )
    with pytest.raises(UserError, match="pip install psutil"):
        save_model([], tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
