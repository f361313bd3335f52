"""Fixtures of tests that need prepared data, or what a run leaves."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nemo_megacpp.data.prepared import PreparedData
    from nemo_megacpp.recipes.recipe import Recipe

VOCAB_SIZE = 300


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """A few thousand tokens, vocabulary `VOCAB_SIZE`; tests only read it."""
    from nemo_megacpp.data.prepare import prepare

    texts = tmp_path_factory.mktemp("texts")
    for number in range(8):
        words = (f"word{number} and {count} more, for a start" for count in range(100))
        (texts / f"{number}.txt").write_text("\n".join(words))
    out = tmp_path_factory.mktemp("small") / "data"
    return prepare([texts], out, vocab_size=VOCAB_SIZE, held_out=0.3, progress=False)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes what a run of a recipe leaves, for a model without a tensor.

    ``save(recipe, step)`` returns the checkpoint, ``run/checkpoints/step=…`` under ``tmp_path``.
    """

    from torch.distributed.checkpoint.metadata import Metadata

    from nemo_megacpp.checkpoint.identity import write_identity

    def make(recipe: Recipe, step: int = 20, tokenizer: str = "0" * 64, run: str = "run") -> Path:
        checkpoint = tmp_path / run / "checkpoints" / f"step={step}"
        (checkpoint / "weights").mkdir(parents=True)
        (checkpoint / "weights" / ".metadata").write_bytes(pickle.dumps(Metadata({}, None, {})))
        identity = {"model": recipe.model, "layout": recipe.layout.short(), "tokenizer": tokenizer}
        write_identity(checkpoint, identity, step)
        return checkpoint

    return make
