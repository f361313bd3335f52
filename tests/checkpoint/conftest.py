from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import save_initial_weights

SMALL = StepSpec(tiny_model("AEM|RF"), dtype="float32")


@pytest.fixture(scope="session")
def small_weights(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of all families, saved by two ranks at TP=2 with whole experts; only read it."""
    folder = tmp_path_factory.mktemp("small") / "weights"
    ranks.run(2, save_initial_weights, SMALL, ParallelLayout.parse("tp=2,etp=1"), str(folder))
    return folder


@pytest.fixture
def own_weights(small_weights: Path, tmp_path: Path) -> Path:
    """A copy of them to damage."""
    return Path(shutil.copytree(small_weights, tmp_path / "own" / "weights"))
