"""The command: text of a saved model in any layout, and one message for what cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.dcp import save_model
from nemo_megacpp.checkpoint.identity import write_identity
from nemo_megacpp.cli import read_arguments
from nemo_megacpp.commands.generate import _document, _request, _run, _sampling
from nemo_megacpp.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from nemo_megacpp.errors import UserError
from nemo_megacpp.inference.ranks import generate_on_rank
from nemo_megacpp.inference.request import Request, make_request
from nemo_megacpp.inference.sampling import GREEDY
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool
from tests.generation import VECTORS, random_model

TEXTS = ["for (int i = 0; i < n; ++i) {", "é"]
MODEL = tiny_model("AEMR", vocab_size=300, seq_length=32, **VECTORS)


def _save(folder: str, model: dict[str, Any], nan: bool = False) -> None:
    built = random_model(model)
    if nan:
        with torch.no_grad():
            built.output_layer.weight[7, 3] = torch.nan
    save_model([built], folder)


def _write(
    folder: Path, ranks: WorkerPool, model: dict[str, Any], tokenizer: str | None, nan: bool = False
) -> Path:
    ranks.run(1, _save, str(folder), model, nan)
    write_identity(folder, {"model": model, "tokenizer": tokenizer, "layout": "tp=1"}, step=3)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["int main() { return 0; }  // for each i\n" * 20], 290), folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, ranks: WorkerPool, tokenizer: Path
) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "step=3"
    return _write(folder, ranks, MODEL, load_tokenizer(tokenizer).fingerprint)


def _arguments(checkpoint: Path, *words: object) -> Any:
    return read_arguments(["generate", str(checkpoint), *map(str, words)])


def _read(checkpoint: Path, *words: object) -> Request:
    args = _arguments(checkpoint, *words)
    content = CheckpointContent(args.checkpoint)
    return _request(args, content, args.prompt, _sampling(args))


def _silent(index: int, text: str, ended: bool) -> None:
    """Emit nothing."""


def _tokens(ranks: WorkerPool, request: Request) -> Sequence[list[int]]:
    found = ranks.run(request.layout.world, generate_on_rank, request, _silent)
    each = [[done.tokens for done in one.completions] for one in found]
    assert each.count(each[0]) == len(each)
    document = json.loads(json.dumps(_document(request, found[0])))
    assert [one["prompt"] for one in document["completions"]] == TEXTS
    assert document["state_bytes"] > 0
    return each[0]


def test_every_layout_says_the_same(ranks: WorkerPool, checkpoint: Path, tokenizer: Path) -> None:
    words = ["--tokenizer", tokenizer, "--max-new-tokens", 6, "--temperature", 0.9, "--seed", 5]
    prompts = [word for text in TEXTS for word in ("--prompt", text)]
    one = _read(checkpoint, *words, *prompts)
    assert [prompt.sampling.seed for prompt in one.prompts] == [5, 6]
    wanted = _tokens(ranks, one)
    assert all(len(tokens) <= 6 for tokens in wanted) and any(wanted)
    for layout in ("tp=2", "ep=2", "pp=2", "tp=2,ep=2,etp=1"):
        assert _tokens(ranks, _read(checkpoint, *words, *prompts, "--layout", layout)) == wanted
    assert _tokens(ranks, _read(checkpoint, *words, *prompts, "--slots", 1)) == wanted


def test_nan_weights_are_one_message(ranks: WorkerPool, tokenizer: Path, tmp_path: Path) -> None:
    folder = _write(tmp_path / "nan", ranks, MODEL, None, nan=True)
    request = _read(folder, "--prompt", "a", "--tokenizer", tokenizer, "--greedy")
    with pytest.raises(WorkerError) as error:
        ranks.run(1, generate_on_rank, request, _silent)
    assert error.value.refusal is not None
    assert "logits are NaN or Inf (1 of " in error.value.refusal


_REFUSED = {
    "nothing to complete": ((), "give --prompt TEXT or --file FILE"),
    "too long": (("--prompt", "()" * 40), "the model's A blocks know 32 positions"),
    "too many": (
        ("--prompt", "a", "--max-new-tokens", 32),
        "33 long: the model's A blocks know 32",
    ),
    "greedy": (("--prompt", "a", "--greedy", "--top-k", 3), "leave --top-k out"),
    "sampling": (("--prompt", "a", "--top-p", 2), "top_p=2.0 must be above 0"),
    "virtual": (("--prompt", "a", "--layout", "pp=2,vpp=2"), "virtual pipeline stages, here VPP=2"),
    "context": (("--prompt", "a", "--layout", "cp=2"), "no context parallelism, here CP=2"),
    "heads": (("--prompt", "a", "--layout", "tp=3"), "num_attention_heads"),
    "no file": (("--file", "/nowhere.cc"), "/nowhere.cc"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_one_message_says_what_cannot_be(checkpoint: Path, tokenizer: Path, case: str) -> None:
    words, message = _REFUSED[case]
    with pytest.raises((UserError, OSError)) as error:
        _run(_arguments(checkpoint, "--tokenizer", tokenizer, *words))
    assert message in str(error.value)


def test_another_tokenizer_is_refused(checkpoint: Path, ranks: WorkerPool, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_tokenizer(train_tokenizer(["def main(): return None\n" * 20], 280), other)
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        _run(_arguments(checkpoint, "--prompt", "a", "--tokenizer", other))
    with pytest.raises(UserError, match="give --tokenizer DIR"):
        _run(_arguments(checkpoint, "--prompt", "a"))  # there is no built-in corpus of 300 tokens
    smaller = _write(tmp_path / "smaller", ranks, {**MODEL, "vocab_size": 270}, None)
    with pytest.raises(UserError, match="tokens, and the model 270: it was trained"):
        _run(_arguments(smaller, "--prompt", "a", "--tokenizer", other))


def test_the_tokenizer_of_the_runs_data_is_found(
    checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(checkpoint, tmp_path / "run" / "checkpoints" / "step=3")
    (tmp_path / "run" / "record").mkdir()
    record = tmp_path / "run" / "record" / "recipe.yaml"
    record.write_text(f"data: {{{tokenizer}: 1.0}}")
    assert _read(own, "--prompt", "a").tokenizer == tokenizer
    record.write_text("data: [")
    with pytest.raises(UserError, match="give --tokenizer DIR"):
        _read(own, "--prompt", "a")


def test_side_channels_are_refused(tmp_path: Path, checkpoint: Path, tokenizer: Path) -> None:
    channel = {"name": "kind", "vocab_size": 4, "field": "kind"}
    folder = tmp_path / "channels"
    shutil.copytree(checkpoint, folder)
    model = {**MODEL, "side_channels": [channel]}
    write_identity(folder, {"model": model, "tokenizer": None, "layout": "tp=1"}, step=3)
    with pytest.raises(UserError, match="has side channels"):
        _run(_arguments(folder, "--prompt", "a", "--tokenizer", tokenizer))


def _without_identity(content: Path, tokenizer: Path) -> Request:
    return make_request(
        CheckpointContent(content),
        TEXTS,
        GREEDY,
        model=MODEL,
        tokenizer=tokenizer,
        max_new_tokens=4,
    )


def test_weights_without_an_identity_take_a_model(
    ranks: WorkerPool, checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("nemo_megacpp*"))
    assert CheckpointContent(bare).identity is None
    found, wanted = (_tokens(ranks, _without_identity(at, tokenizer)) for at in (bare, checkpoint))
    assert found == wanted


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="There is no checkpoint at"):
        _run(_arguments(tmp_path / "missing", "--prompt", "a"))
    elsewhere = tmp_path / "iter_0000003"
    elsewhere.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "nemo_megacpp.json":
            (elsewhere / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="does not say which model it holds"):
        _run(_arguments(elsewhere, "--prompt", "a"))
