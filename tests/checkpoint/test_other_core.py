"""A checkpoint written on one Megatron-Core resumes on the other, in another layout."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.core.releases import PROVED, imported
from nemo_megacpp.hf.export import export_hf
from nemo_megacpp.hf.importing import import_hf
from nemo_megacpp.proof.core_run import resume_and_train
from nemo_megacpp.proof.step_result import Carried, checkpoint_of
from nemo_megacpp.runtime.workers import WorkerPool
from tests.checkpoint.exchange import LOADED_IN, SAVED_IN, SPEC, Told
from tests.path import train_and_save

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = dict(zip(PROVED, (".venv", ".venv-core-new"), strict=True))
"""Release -> folder of the environment that make sets up with it."""

pytestmark = pytest.mark.processes


class Exchanged(NamedTuple):
    """What was saved here and in the other environment, what each loaded of the other's, and the
    other's checkpoint."""

    here: Carried
    loaded_here: Carried
    told: Told
    theirs: Path


@pytest.fixture(scope="module")
def exchanged(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Exchanged:
    """Save here (through NeMo where that is) and there, and load each in the other."""
    (other,) = (folder for release, folder in ENVIRONMENTS.items() if release != imported())
    python = ROOT / other / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{other} is not set up; make test-core-new sets up both environments")
    folder = tmp_path_factory.mktemp("exchanged")
    here: Carried = ranks.run(2, train_and_save, SPEC, SAVED_IN, str(folder / "ours"), 1)[0]
    command = [str(python), "-W", "ignore", "-m", "tests.checkpoint.other_core"]
    done = subprocess.run(
        [*command, str(folder), checkpoint_of(str(folder / "ours"), 1)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: Told = pickle.loads((folder / "told.pickle").read_bytes())
    assert {told.release, imported()} == set(PROVED)
    theirs = checkpoint_of(str(folder / "theirs"), 1)
    loaded: Carried = ranks.run(2, resume_and_train, SPEC, LOADED_IN, theirs, 1)[0]
    return Exchanged(here, loaded, told, Path(theirs))


def _hold(saved: Carried, loaded: Carried) -> None:
    """The state bit for bit, and the step that follows."""
    assert loaded.steps == saved.steps == 1
    mine, found = saved.state.values, loaded.state.values
    assert mine.keys() == found.keys()
    assert [key for key in mine if not np.array_equal(mine[key], found[key])] == []
    before, after = saved.following, loaded.following
    assert before is not None and after is not None
    assert after.losses[-1] == pytest.approx(before.losses[-1], rel=1e-6)
    assert after.grad_norms[-1] == pytest.approx(before.grad_norms[-1], rel=1e-5)


def test_ours_resumes_there(exchanged: Exchanged) -> None:
    _hold(exchanged.here, exchanged.told.loaded)


def test_theirs_resumes_here(exchanged: Exchanged) -> None:
    _hold(exchanged.told.saved, exchanged.loaded_here)


def test_theirs_is_exported_here(exchanged: Exchanged, tmp_path: Path, ranks: WorkerPool) -> None:
    """For transformers, and back, bit for bit."""
    export_hf(exchanged.theirs, tmp_path / "hf")
    pool = lambda size: contextlib.nullcontext(ranks)  # noqa: E731
    import_hf(tmp_path / "hf", tmp_path / "back", pool)
    saved, back = (CheckpointContent(path) for path in (exchanged.theirs, tmp_path / "back"))
    assert saved.model_tensors.keys() == back.model_tensors.keys()
    for name in saved.model_tensors:
        mine, found = (each.read_tensor(each.prefix + name) for each in (saved, back))
        assert mine.dtype == found.dtype and torch.equal(mine, found), name
