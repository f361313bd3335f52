"""Side channels beside the tokens: prepared, verified, and cut into the same rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_megacpp.data import prepare as prepare_module
from nemo_megacpp.data.checksums import verify
from nemo_megacpp.data.indexed import IndexedTokens
from nemo_megacpp.data.packed_rows import open_epoch
from nemo_megacpp.data.prepare import prepare
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.data.side_channels import ngram_ids
from nemo_megacpp.data.tokenizer import load_tokenizer
from nemo_megacpp.errors import UserError
from nemo_megacpp.side_channels import read_side_channels

CHANNELS: list[dict[str, Any]] = [
    {"name": "language", "vocab_size": 9, "field": "lang"},
    {"name": "kind", "vocab_size": 200, "field": "kinds"},
    {"name": "bigram", "vocab_size": 1000, "ngram": 2},
]
TEXTS = [
    f"{'é' * (k % 4)}some words 世界, number {k} of many words\n" * (1 + k % 5) for k in range(60)
]


def _line(number: int, text: str) -> dict[str, Any]:
    return {"text": text, "lang": number % 9, "kinds": [ord(c) % 200 for c in text]}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "corpus.jsonl"
    rows = (json.dumps(_line(*item)) for item in enumerate(TEXTS))
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def prepared(lines: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    out = tmp_path_factory.mktemp("prepared") / "out"
    options = {"vocab_size": 300, "held_out": 0.3, "document_multiple": 8}
    return prepare([lines], out, side_channels=CHANNELS, **options, progress=False)


def _naive_ngram(tokens: list[int], n: int, vocab_size: int) -> Iterator[int]:
    for place in range(len(tokens)):
        state = 0x9E3779B97F4A7C15
        for back in range(n - 1, -1, -1):
            token = tokens[place - back] + 1 if place >= back else 0
            state = (state ^ token) * 0xFF51AFD7ED558CCD % 2**64
            state ^= state >> 33
        yield state % vocab_size


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ngram_hash(n: int) -> None:
    tokens = np.random.default_rng(n).integers(0, 70000, 41)
    assert ngram_ids(tokens, n, 997).tolist() == list(_naive_ngram(tokens.tolist(), n, 997))
    assert ngram_ids(tokens[:0], n, 997).tolist() == []


def test_ids_of_a_document(prepared: PreparedData) -> None:
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    by_text = {text: number for number, text in enumerate(TEXTS)}
    seen = 0
    for split in ("train", "heldout"):
        tokens = IndexedTokens.open(prepared.root / split)
        beside = {
            c["name"]: IndexedTokens.open(prepared.root / f"{split}.{c['name']}") for c in CHANNELS
        }
        for number in range(len(tokens.lengths)):
            ids = tokens.document(number).tolist()
            real = [i for i in ids if i != tokenizer.eos_id]
            text = tokenizer.tokenizer.decode(real)
            line = _line(by_text[text], text)
            found = {name: part.document(number).tolist() for name, part in beside.items()}
            assert found["language"] == [line["lang"]] * len(ids)
            assert found["bigram"] == list(_naive_ngram(ids, 2, 1000))
            # A byte-level token may be a part of a character: count the characters before it.
            starts = [
                len(tokenizer.tokenizer.decode(real[:k]).replace("\ufffd", "").rstrip("\ufffd"))
                for k in range(len(real))
            ]
            expected = [line["kinds"][min(start, len(text) - 1)] for start in starts]
            end = [line["kinds"][-1]] * (len(ids) - len(real))
            assert found["kind"] == expected + end
            seen += 1
    assert seen == len(TEXTS)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_those_of_the_tokens(prepared: PreparedData, packed: bool) -> None:
    """The hash of a row's tokens, computed from the row, agrees wherever two tokens of one document
    are in the row; a row may begin amid a document."""
    channels = read_side_channels(CHANNELS)
    rows = open_epoch(prepared, 37, 1, packed=packed, side_channels=channels)
    plain = open_epoch(prepared, 37, 1, packed=packed)
    assert len(rows) == len(plain) > 20
    amid = 0
    for row, like in zip(rows, plain, strict=True):
        assert like.keys() == row.keys() - {c.key for c in channels}
        for key, value in like.items():
            assert torch.equal(row[key], value), key
        tokens, eos = row["tokens"].tolist(), prepared.eos_id
        found = row["side_channel.bigram"].tolist()
        assert row["side_channel.bigram"].shape == row["tokens"].shape
        for place in range(1, len(tokens)):
            begins = tokens[place - 1] == eos and tokens[place] != eos
            pair = [tokens[place]] if begins else tokens[place - 1 : place + 1]
            assert found[place] == list(_naive_ngram(pair, 2, 1000))[-1]
        amid += found[0] != next(_naive_ngram(tokens, 2, 1000))
    assert amid > 10, "most rows begin amid a document, and know the token before"


def test_processes_and_shards_change_nothing(
    prepared: PreparedData, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module.shards_module, "SHARD_BYTES", 2000)
    options = {"vocab_size": 300, "held_out": 0.3, "document_multiple": 8, "num_workers": 1}
    other = prepare([lines], tmp_path / "out", side_channels=CHANNELS, **options, progress=False)
    for path in sorted(prepared.root.glob("*.bin")) + sorted(prepared.root.glob("*.idx")):
        assert path.read_bytes() == (other.root / path.name).read_bytes(), path.name


def test_another_request(prepared: PreparedData, lines: Path) -> None:
    options = {"vocab_size": 300, "held_out": 0.3, "document_multiple": 8, "progress": False}
    same = prepare([lines], prepared.root, side_channels=CHANNELS, **options)
    assert same.side_channels == prepared.side_channels
    with pytest.raises(UserError, match="different: side_channels"):
        prepare([lines], prepared.root, side_channels=CHANNELS[:1], **options)


def test_what_a_model_needs(prepared: PreparedData) -> None:
    prepared.validate_side_channels(read_side_channels(CHANNELS[1:]))
    with pytest.raises(UserError, match=r"no side channel x; it has language, kind, bigram\. Prep"):
        prepared.validate_side_channels(read_side_channels([{**CHANNELS[0], "name": "x"}]))
    with pytest.raises(UserError, match="made with ngram=2 and vocab_size=1000, and the model"):
        prepared.validate_side_channels(read_side_channels([{**CHANNELS[2], "ngram": 3}]))


def test_damage_is_found(prepared: PreparedData, tmp_path: Path) -> None:
    assert verify(prepared).blocks >= 16
    copy = tmp_path / "copy"
    shutil.copytree(prepared.root, copy)
    path = copy / "train.kind.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")
    with pytest.raises(UserError, match=r"train\.kind\.bin has changed in block 0"):
        verify(PreparedData.open(copy))
    rows = open_epoch(PreparedData.open(copy), 37, 1, side_channels=read_side_channels(CHANNELS))
    with pytest.raises(UserError, match="beyond vocab_size=200 in side channel kind"):
        list(rows)
    (copy / "train.kind.bin").unlink()
    with pytest.raises(UserError, match=r"train\.kind\.bin"):
        PreparedData.open(copy)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"text": "words"}, "has no field 'lang' for side channel language"),
        ({"text": "words", "lang": "c"}, "something else than an integer"),
        ({"text": "words", "lang": True}, "something else than an integer"),
        ({"text": "words", "lang": 9}, "has id 9 in field 'lang'; side channel language has ids 0"),
        ({"text": "words", "lang": -1}, "has id -1"),
        ({"text": "words", "lang": [1, 2]}, "has 2 integers .* and a text of 5 characters"),
    ],
)
def test_lines_that_are_refused(line: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(UserError, match=said):
        prepare([path], tmp_path / "out", side_channels=CHANNELS[:1], progress=False)


def test_text_files_have_no_fields(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words")
    with pytest.raises(UserError, match="is not JSONL and has no field 'lang'"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", side_channels=CHANNELS[:1], progress=False)
