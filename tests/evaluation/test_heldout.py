"""The held-out loss is that of the model, to the last token, in every layout."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_megacpp.checkpoint.dcp import save_model
from nemo_megacpp.checkpoint.folder import WEIGHTS
from nemo_megacpp.checkpoint.identity import write_identity
from nemo_megacpp.checkpoint.weights import build_saved_model, load_weights
from nemo_megacpp.cli import read_arguments
from nemo_megacpp.data.indexed import IndexedTokens
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.data.tokenizer import load_tokenizer
from nemo_megacpp.errors import UserError
from nemo_megacpp.evaluation.heldout import Request
from nemo_megacpp.evaluation.report import Evaluation, evaluate, evaluation_document
from nemo_megacpp.evaluation.rows import HeldoutRows
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import save_initial_weights
from tests.shared_data import VOCAB_SIZE

MODEL = {**tiny_model("AEMR"), "vocab_size": VOCAB_SIZE, "seq_length": 16}
ROWS = 7
"""An odd number: the last microbatches of several ranks count for nothing."""


@pytest.fixture(scope="module")
def checkpoint(
    ranks: WorkerPool, small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Noisy weights, saved at TP=2."""
    folder = tmp_path_factory.mktemp("checkpoint")
    spec = StepSpec(MODEL, dtype="float64")
    layout = ParallelLayout.parse("tp=2,etp=1")
    ranks.run(2, save_initial_weights, spec, layout, str(folder / WEIGHTS))
    identity = {"model": MODEL, "layout": "tp=2", "tokenizer": small_data.tokenizer_fingerprint}
    write_identity(folder, identity, 5)
    return folder


Evaluate = Callable[..., Evaluation]


@pytest.fixture(scope="module")
def evaluated(ranks: WorkerPool, small_data: PreparedData, checkpoint: Path) -> Evaluate:
    def run(
        layout: str, packed: bool = False, size: int = 1, most: int | None = ROWS
    ) -> Evaluation:
        rows = HeldoutRows(small_data, MODEL["seq_length"], packed, most=most)
        request = Request(checkpoint, MODEL, ParallelLayout.parse(layout), "float64", rows, size)
        return evaluate(request, lambda _: contextlib.nullcontext(ranks))

    return run


def _reference(checkpoint: str, model: dict[str, Any], text: list[int]) -> list[float]:
    """Losses of the tokens of whole rows, from the logits of a model on one rank."""
    start_model_parallel(ParallelLayout())
    _, (chunk,) = build_saved_model(model, ParallelLayout(), torch.float64)
    load_weights([chunk], checkpoint)
    ids, length, losses = torch.tensor(text), model["seq_length"], []
    with torch.no_grad():
        for start in range(0, len(text) - 1, length):
            tokens = ids[start : start + length][None]
            logits = chunk(tokens, torch.arange(length)[None], None)[0]
            labels = ids[start + 1 : start + length + 1]
            losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
    return losses


@pytest.fixture(scope="module")
def alone(evaluated: Evaluate) -> Evaluation:
    return evaluated("tp=1")


def test_the_loss_is_that_of_the_models_logits(
    ranks: WorkerPool, small_data: PreparedData, checkpoint: Path, alone: Evaluation
) -> None:
    indexed = IndexedTokens.open(small_data.heldout_prefix)
    stored = np.concatenate([indexed.document(n) for n in range(len(indexed.lengths))])
    length = MODEL["seq_length"]
    text = stored[: ROWS * length + 1].astype(int).tolist()
    losses = np.array(ranks.run(1, _reference, str(checkpoint), MODEL, text)[0])
    assert alone.tokens == len(losses) == ROWS * length
    assert alone.loss == pytest.approx(losses.mean(), rel=1e-6)
    expected = losses.reshape(ROWS, length).mean(0)
    np.testing.assert_allclose(alone.by_position, expected, rtol=1e-6)
    assert np.std(expected) > 1e-3
    loaded = load_tokenizer(small_data.tokenizer_dir)
    document, *others = "".join(loaded.tokenizer.id_to_token(i) for i in text[1:]).split(
        "<|endoftext|>"
    )
    spelled = document + "".join(others)
    assert alone.bytes == len(spelled)
    assert alone.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / len(spelled), rel=1e-6)


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ("tp=2,etp=1", 1),
        ("pp=2", 2),
        ("pp=2,vpp=2", 1),
        ("cp=2", 1),
        ("world_size=2,ep=2", 2),
    ],
)
def test_it_is_equal_in_every_layout(
    evaluated: Evaluate, alone: Evaluation, layout: str, size: int
) -> None:
    found = evaluated(layout, size=size)
    assert found.loss == pytest.approx(alone.loss, rel=1e-6)
    np.testing.assert_array_equal(found.tokens_by_position, alone.tokens_by_position)
    np.testing.assert_allclose(found.by_position, alone.by_position, rtol=1e-6)
    assert found.bytes == alone.bytes


def test_documents_apart_are_other_losses(evaluated: Evaluate, small_data: PreparedData) -> None:
    """In one layout and another; the end of a document predicts nothing."""
    first = int(IndexedTokens.open(small_data.heldout_prefix).lengths[0])
    most = first // MODEL["seq_length"] + 3
    one, other = (evaluated(text, packed=True, most=most) for text in ("tp=1", "pp=2"))
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    mixed = evaluated("tp=1", most=most)
    assert one.tokens < mixed.tokens
    assert one.loss != pytest.approx(mixed.loss, rel=1e-5)


def test_every_token_but_the_first_is_predicted_once(small_data: PreparedData) -> None:
    rows = HeldoutRows(small_data, 100)
    indexed = IndexedTokens.open(small_data.heldout_prefix)
    stored = np.concatenate([indexed.document(n) for n in range(len(indexed.lengths))])
    read = [rows[index] for index in range(len(rows))]
    labels = np.concatenate([row["labels"][row["loss_mask"] > 0].numpy() for row in read])
    tokens = np.concatenate([row["tokens"][row["loss_mask"] > 0].numpy() for row in read])
    np.testing.assert_array_equal(labels, stored[1:])
    np.testing.assert_array_equal(tokens, stored[:-1])
    assert len(labels) % 100, "the last row is a part"
    loaded = load_tokenizer(small_data.tokenizer_dir)
    bytes_of = np.array(loaded.bytes_of_tokens())
    text = small_data.splits["heldout"].bytes
    assert text is not None
    assert rows.predicted_bytes(bytes_of) == text - bytes_of[stored[0]]
    assert bytes_of[small_data.eos_id] == 0


def test_buckets_hold_every_token_once(alone: Evaluation) -> None:
    buckets = alone.buckets()
    assert [bucket[:2] for bucket in buckets] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert sum(tokens for _, _, tokens, _ in buckets) == alone.tokens
    total = sum(tokens * loss for _, _, tokens, loss in buckets)
    assert total / alone.tokens == pytest.approx(alone.loss)
    document = evaluation_document(alone)
    assert json.loads(json.dumps(document, allow_nan=False))["loss"] == alone.loss


def _save_nan(source: str, out: str) -> None:
    start_model_parallel(ParallelLayout())
    _, chunks = build_saved_model(MODEL, ParallelLayout(), torch.float64)
    load_weights(chunks, source)
    with torch.no_grad():
        chunks[0].decoder.final_norm.weight[0] = float("nan")
    save_model(chunks, out)


def test_a_loss_of_nan_is_refused(
    ranks: WorkerPool, small_data: PreparedData, checkpoint: Path, tmp_path: Path
) -> None:
    ranks.run(1, _save_nan, str(checkpoint), str(tmp_path / WEIGHTS))
    rows = HeldoutRows(small_data, MODEL["seq_length"], most=2)
    request = Request(tmp_path, MODEL, ParallelLayout(), "float32", rows)
    with pytest.raises(UserError, match=r"NaN or Inf for 32 of 32 tokens, first at place 0"):
        evaluate(request, lambda _: contextlib.nullcontext(ranks))


def test_what_does_not_fit_is_refused_before_ranks_start(
    small_data: PreparedData, checkpoint: Path, tmp_path: Path
) -> None:
    def refusal(*words: str, data: Path = small_data.root) -> str:
        args = read_arguments(["evaluate", *words, "--data", str(data)])
        with pytest.raises(UserError) as refused:
            args.run(args)
        return str(refused.value)

    assert "There is no checkpoint at nowhere" in refusal("nowhere")
    assert "does not exist. Make it" in refusal(str(checkpoint), data=tmp_path / "no")
    assert "is not divisible by TP = 5" in refusal(str(checkpoint), "--layout", "tp=5")
    assert "evaluate starts at most 16" in refusal(str(checkpoint), "--layout", "world_size=32")
    assert "'0' must be a whole number" in refusal(str(checkpoint), "--rows", "0")
    packs = ("--packed-documents", "--layout", "cp=2")
    assert "needs a multiple of 4 tokens" in refusal(str(checkpoint), *packs)
    other = tmp_path / "other"
    other.mkdir()
    (other / WEIGHTS).symlink_to(checkpoint / WEIGHTS)
    assert "does not say which model it holds" in refusal(str(other))
    identity = {"model": MODEL, "layout": None, "tokenizer": "f" * 64}
    write_identity(other, identity, 5)
    assert "data of another tokenizer (ffffffffffff…)" in refusal(str(other))
    model = {**MODEL, "vocab_size": 384}
    write_identity(other, {**identity, "model": model, "tokenizer": None}, 5)
    assert "has a vocabulary of 384, and" in refusal(str(other))
    write_identity(other, {**identity, "model": {**MODEL, "vocab_size": "384"}}, 5)
    assert "is damaged: model: vocab_size" in refusal(str(other))
    write_identity(other, {**identity, "model": {}}, 5)
    assert "is damaged: model: pattern is empty" in refusal(str(other))
    write_identity(other, {**identity, "model": {**MODEL, "family_modules": ["x"]}}, 5)
    assert "imports no code that a checkpoint names" in refusal(str(other))
