"""A folder of Hugging Face's form is what a run starts from, in the ranks of any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_megacpp import start
from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.hf.export import export_hf
from nemo_megacpp.preflight import preflight
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.recipes.recipe import Recipe, resolve
from nemo_megacpp.runs.initial_weights import imported_weights, initial_weights
from nemo_megacpp.runs.run_folder import INITIAL_WEIGHTS, RECIPE_FILE
from nemo_megacpp.runtime.workers import WorkerPool
from tests.hf.models import save_with_logits

pytestmark = pytest.mark.processes
SMALL = (
    *("pattern=AF", "depth=2", "hidden_size=32", "ffn_hidden_size=64", "num_attention_heads=4"),
    *("num_query_groups=2", "kv_channels=8", "seq_length=32", "max_steps=2"),
)


@pytest.fixture
def small(small_data: PreparedData) -> tuple[str, ...]:
    """Overrides of a recipe."""
    return (*SMALL, f"data={small_data.root}")


def _resolve(small: tuple[str, ...], *overrides: str) -> Recipe:
    return resolve("nam56r_tiny", (*small, *overrides))


@pytest.fixture
def folder(ranks: WorkerPool, small: tuple[str, ...], tmp_path: Path) -> Path:
    """The export of a checkpoint, which is beside it."""
    recipe = preflight(_resolve(small, f"run_dir={tmp_path / 'none'}"), announce=False).recipe
    saved = tmp_path / "saved" / "step=3"
    ranks.run(1, save_with_logits, [str(saved)], [StepSpec(recipe.model, dtype="float64")])
    export_hf(saved, tmp_path / "hf")
    return tmp_path / "hf"


def test_the_ranks_load_what_was_exported(
    folder: Path, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit. What is recorded is what the user gave, and nothing is left beside it."""
    run_dir, seen = tmp_path / "run", []

    def launch(command: list[str], world: int, logs: Path) -> None:
        assert Path(command[2]) == run_dir / RECIPE_FILE
        recipe = resolve(command[2], ())
        assert (recipe.init_from, world) == (str(folder), 2)
        weights = initial_weights(recipe, run_dir)
        assert weights is not None
        wanted, found = (
            CheckpointContent(folder.parent / "saved" / "step=3"),
            CheckpointContent(weights),
        )
        assert wanted.tensors.keys() == found.tensors.keys()
        seen.extend(
            name
            for name in wanted.tensors
            if torch.equal(wanted.read_tensor(name), found.read_tensor(name))
        )
        assert len(seen) == len(wanted.tensors)

    monkeypatch.setattr(start, "launch", launch)
    start.train_recipe(_resolve(small, f"init_from={folder}", f"run_dir={run_dir}", "tp=2"))
    assert seen
    assert not (run_dir / INITIAL_WEIGHTS).is_symlink()


def test_another_model_is_refused_by_the_name_of_its_folder(
    folder: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    other = _resolve(
        small,
        f"init_from={folder}",
        f"run_dir={run_dir}",
        "layernorm_epsilon=1e-3",
        "add_qkv_bias=true",
    )
    with pytest.raises(UserError) as refused:
        start.train_recipe(other)
    assert f"{folder} is a checkpoint of another model: add_qkv_bias is False" in str(refused.value)
    assert not run_dir.exists()


def test_what_needs_no_import(folder: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    """A checkpoint, and a run that resumes its own."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "step=3").symlink_to(folder.parent / "saved" / "step=3")
    for overrides in (
        (f"init_from={folder.parent / 'saved' / 'step=3'}",),
        (f"init_from={folder}", "resume=auto", f"run_dir={run_dir}"),
    ):
        with imported_weights(_resolve(small, *overrides)) as imported:
            assert imported is None
