"""Generation from what Megatron's script saves: a recipe says which model it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.dcp import save_model
from nemo_megacpp.checkpoint.identity import write_identity
from nemo_megacpp.cli import read_arguments
from nemo_megacpp.commands.generate import _request, _sampling
from nemo_megacpp.data.tokenizer import save_tokenizer, train_tokenizer
from nemo_megacpp.errors import UserError
from nemo_megacpp.inference.ranks import generate_on_rank
from nemo_megacpp.inference.request import Request
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool
from tests.bare import prepare
from tests.checkpoint.script_checkpoint import save_trainee

SETTINGS = tiny_model("AEMR", num_layers=4, vocab_size=300, seq_length=32)
WORDS = ("--prompt", "int main() {", "--prompt", "for", "--max-new-tokens", "8", "--seed", "3")


def _train(model: dict[str, Any], folder: str) -> None:
    """Take a step; save it as Megatron's script does, and in the package's form."""
    spec = StepSpec(model, dtype="float32", global_batch_size=2)
    trainee = prepare(spec, ParallelLayout.parse("tp=2,etp=1"))
    trainee.forward_backward()
    trainee.optimizer.step()
    save_trainee(trainee, f"{folder}/script", step=1, samples=2)
    save_model(trainee.chunks, f"{folder}/ours")


def _silent(index: int, text: str, ended: bool) -> None:
    """Emit nothing."""


def _read(checkpoint: Path, *words: object) -> Request:
    args = read_arguments(["generate", str(checkpoint), *WORDS, *map(str, words)])
    return _request(args, CheckpointContent(args.checkpoint), args.prompt, _sampling(args))


def test_a_recipe_names_the_model_of_megatrons_script(ranks: WorkerPool, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    save_tokenizer(
        train_tokenizer(["int main() { return 0; }  // for each i\n" * 20], 290), tokenizer
    )
    recipe, other = tmp_path / "model.yaml", tmp_path / "other.yaml"
    recipe.write_text(yaml.safe_dump({"recipe": "nam56r_tiny", **SETTINGS}))
    other.write_text(
        yaml.safe_dump({"recipe": "nam56r_tiny", **SETTINGS, "hybrid_pattern": "AEMM"})
    )
    model = dict(resolve(str(recipe)).model)
    ranks.run(2, _train, model, str(tmp_path))
    write_identity(tmp_path / "ours", {"model": model, "tokenizer": None, "layout": "tp=2"}, step=1)

    def tokens(checkpoint: str, *words: object) -> list[list[int]]:
        request = _read(tmp_path / checkpoint, "--tokenizer", tokenizer, *words)
        found = ranks.run(request.layout.world, generate_on_rank, request, _silent)
        return [one.tokens for one in found[0].completions]

    wanted = tokens("ours")
    assert all(wanted)
    assert tokens("script", "--recipe", recipe) == wanted
    assert tokens("script", "--recipe", recipe, "--layout", "tp=2") == wanted
    with pytest.raises(UserError, match="does not say which model it holds"):
        _read(tmp_path / "script", "--tokenizer", tokenizer)
    with pytest.raises(WorkerError) as error:
        tokens("script", "--recipe", other)
    assert "is a checkpoint of another model" in str(error.value.refusal)
