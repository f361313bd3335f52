"""Data of Megatron's own ``preprocess_data.py``, taken as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from nemo_megacpp.cli import build_parser
from nemo_megacpp.data.adopt import adopt
from nemo_megacpp.data.indexed import IndexedTokens
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError


def write(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any = np.uint16) -> Path:
    """Write documents as ``preprocess_data.py`` does, with Megatron's own builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def documents(prepared: PreparedData) -> list[list[int]]:
    """Forty documents of unlike lengths, each with its end token."""
    random = np.random.default_rng(0)
    lengths = random.integers(3, 30, 40)
    return [[*random.integers(2, 290, n).tolist(), prepared.eos_id] for n in lengths]


def take(prefix: Path, prepared: PreparedData, **options: Any) -> PreparedData:
    out = prefix.parent / "out"
    return adopt(prefix, out, tokenizer=prepared.tokenizer_dir, progress=False, **options)


def read(prefix: str) -> list[list[int]]:
    return [ids.tolist() for ids in IndexedDataset(prefix)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_every_document_is_in_one_split_and_nothing_is_copied(
    documents: list[list[int]], prepared: PreparedData, tmp_path: Path, dtype: Any
) -> None:
    data = take(write(tmp_path / "web", documents, dtype), prepared, held_out=0.2)
    train, heldout = read(data.train_prefix), read(data.heldout_prefix)
    assert sorted(train + heldout) == sorted(documents)
    assert 4 <= len(heldout) <= 12
    assert (data.splits["train"].documents, data.tokens) == (len(train), sum(map(len, train)))
    assert data.splits["train"].bytes is None and data.document_multiple == 1
    assert (data.root / "train.bin").resolve() == tmp_path / "web.bin"
    assert (data.root / "heldout.bin").is_symlink()
    assert (data.vocab_size, data.eos_id) == (prepared.vocab_size, prepared.eos_id)
    ours = IndexedTokens.open(data.heldout_prefix)
    assert [ours.document(n).tolist() for n in range(len(heldout))] == heldout
    assert ours.document(1, 2).tolist() == heldout[1][:2]


def test_files_of_their_own_are_held_out(
    documents: list[list[int]], prepared: PreparedData, tmp_path: Path
) -> None:
    write(tmp_path / "valid", documents[:3])
    prefix = write(tmp_path / "web", documents[3:])
    data = take(prefix, prepared, held_out_prefix=tmp_path / "valid.idx")
    assert read(data.train_prefix) == documents[3:]
    assert read(data.heldout_prefix) == documents[:3]


def test_a_second_time_it_is_reused_unless_the_files_changed(
    documents: list[list[int]],
    prepared: PreparedData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefix = write(tmp_path / "web", documents)
    first = take(prefix, prepared)
    assert take(prefix, prepared) == first
    assert "Reusing" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"different: held_out 0\.05 \(now 0\.5\)"):
        take(prefix, prepared, held_out=0.5)
    write(prefix, documents * 2)
    message = r"web\.bin was changed since it was adopted\. Make it again: nemo-megacpp data adopt"
    with pytest.raises(UserError, match=message):
        PreparedData.open(first.root)
    assert take(prefix, prepared, overwrite=True).tokens > first.tokens


def test_lengths_allow_for_context_parallelism_if_no_text_has_an_end_token(
    prepared: PreparedData, tmp_path: Path
) -> None:
    end = prepared.eos_id
    (tmp_path / "a").mkdir()
    filled = [[5, 6, 7, end], [5] * 11 + [end], [9, 9, end, end]]
    assert take(write(tmp_path / "a" / "x", filled[:2]), prepared).document_multiple == 4
    # An end token amid a document cuts it for packs: its parts are no multiples.
    (tmp_path / "b").mkdir()
    assert take(write(tmp_path / "b" / "x", filled), prepared).document_multiple == 1


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[5, 300, 0], [6, 0]], r"has token id 300, but the tokenizer has 300 tokens: another"),
        ([[5, 0], [6, 7], [8, 9]], r"2 of the 3 documents .* first number 1, do not end in .* 0:"),
        ([[5, 0]], r"has 1 document; at least 2 are needed"),
        ([], r"web\.bin has no documents"),
        ([[5, 0], [], [6, 0]], r"has a document without tokens"),
    ],
)
def test_files_of_another_tokenizer_are_refused(
    documents: list[list[int]], message: str, prepared: PreparedData, tmp_path: Path
) -> None:
    assert (prepared.vocab_size, prepared.eos_id) == (300, 0)
    with pytest.raises(UserError, match=message):
        take(write(tmp_path / "web", documents), prepared)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["web.bin", "web.idx"]


def test_other_files_are_refused(prepared: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read '.*nowhere\.idx'"):
        take(tmp_path / "nowhere", prepared)
    builder = IndexedDatasetBuilder(f"{tmp_path / 'sentences'}.bin", dtype=np.uint16)
    builder.add_document(np.array([5, 6, 7, 0]), [2, 2])
    builder.finalize(f"{tmp_path / 'sentences'}.idx")
    with pytest.raises(UserError, match=r"2 sequences in 1 documents; .*--split-sentences"):
        take(tmp_path / "sentences", prepared)
    with pytest.raises(UserError, match=r"held-out share is 1\.5"):
        take(tmp_path / "sentences", prepared, held_out=1.5)


def test_the_command_and_the_hint_that_leads_to_it(
    documents: list[list[int]],
    prepared: PreparedData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefix, out = write(tmp_path / "web", documents), tmp_path / "out"
    with pytest.raises(UserError, match=rf"data adopt {prefix} --tokenizer DIR --out DIR"):
        PreparedData.open(prefix)
    tokenizer = ["--tokenizer", str(prepared.tokenizer_dir)]
    parser = build_parser()
    for words in (
        ["adopt", str(prefix), *tokenizer, "--out", str(out)],
        ["inspect", str(out), "--rows", "2", "--seq-length", "16"],
    ):
        args = parser.parse_args(["data", *words])
        assert args.run(args) == 0
    assert "train row 0" in capsys.readouterr().out
    both = ["--held-out", "0.1", "--held-out-prefix", str(prefix)]
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["data", "adopt", str(prefix), *tokenizer, "--out", str(out), *both])
    assert "not allowed with argument --held-out" in capsys.readouterr().err
