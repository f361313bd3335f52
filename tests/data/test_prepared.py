from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest

from nemo_megacpp.commands import data as commands
from nemo_megacpp.data.indexed import IndexedTokens, token_dtype
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError


@pytest.fixture
def copy(prepared: PreparedData, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.root, tmp_path / "data"))


def test_opens_anywhere(prepared: PreparedData, copy: Path) -> None:
    data = PreparedData.open(str(copy))
    assert data.splits == prepared.splits
    assert data.train_prefix == str(copy / "train")
    assert data.heldout_prefix == str(copy / "heldout")
    data.validate_tokenizer(prepared.tokenizer_dir)
    data.validate_tokenizer(prepared.tokenizer_fingerprint)


def test_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    command = r"nemo-megacpp data prepare PATH… --out DIR"
    with pytest.raises(UserError, match=rf"nowhere' does not exist\. Make it: {command}"):
        PreparedData.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"it has no data\.json\. Make it: {command}"):
        PreparedData.open(tmp_path)


def truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "heldout.bin", "heldout.idx"])
def test_truncated_and_missing_files_are_named(copy: Path, name: str) -> None:
    truncate(copy / name, 2)
    size = (copy / name).stat().st_size
    message = rf"damaged\. .*{name} has {size:,} bytes; its .* says {size + 2:,}\. Make it again"
    with pytest.raises(UserError, match=message):
        PreparedData.open(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=rf"Cannot read .*{name}'"):
        PreparedData.open(copy)


def test_swapped_splits_and_foreign_index(copy: Path) -> None:
    for suffix in ("bin", "idx"):
        shutil.copy(copy / f"heldout.{suffix}", copy / f"train.{suffix}")
    with pytest.raises(UserError, match=r"train\.idx holds .* data\.json says"):
        PreparedData.open(copy)
    (copy / "train.idx").write_bytes(b"something else, long enough for a header")
    with pytest.raises(UserError, match=r"train\.idx is not a Megatron index"):
        PreparedData.open(copy)
    (copy / "train.idx").write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.idx is truncated: 0 bytes"):
        PreparedData.open(copy)


def test_changed_tokenizer_is_refused(prepared: PreparedData, copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    was = prepared.tokenizer_fingerprint[:12]
    with pytest.raises(UserError, match=rf"made with another tokenizer .*: {was}… made it"):
        PreparedData.open(copy)
    with pytest.raises(UserError, match="made with another tokenizer"):
        prepared.validate_tokenizer(copy / "tokenizer")
    with pytest.raises(UserError, match="made with another tokenizer"):
        prepared.validate_tokenizer("0" * 64)
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        PreparedData.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "format version 99; this release reads version 2"),
        ({"splits": {}}, r"data\.json is damaged: splits dictionary should have at least 2 items"),
        ({"format": "other"}, "does not describe prepared data"),
    ],
)
def test_bad_manifest(copy: Path, change: dict, message: str) -> None:
    manifest = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=message):
        PreparedData.open(copy)
    (copy / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.json is damaged: invalid JSON"):
        PreparedData.open(copy)


def test_index_agrees_with_megatron(prepared: PreparedData) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    ours, theirs = IndexedTokens.open(prepared.train_prefix), IndexedDataset(prepared.train_prefix)
    assert ours.lengths.tolist() == theirs.sequence_lengths.tolist()
    for i in range(len(theirs)):
        assert ours.document(i).tolist() == theirs[i].tolist()
        assert ours.document(i, 3).tolist() == theirs[i][:3].tolist()


def test_token_types_are_megatrons() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (300, 65499, 65500, 65536, 200_000):
        assert token_dtype(size) is DType.optimal_dtype(size)


def test_commands(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parser = argparse.ArgumentParser()
    commands.add_parser(parser.add_subparsers())
    out = str(tmp_path / "out")
    options = ["--vocab-size", "300", "--held-out", "0.3"]
    args = parser.parse_args(["data", "prepare", str(corpus), "--out", out, *options])
    assert args.run(args) == 0
    shown = capsys.readouterr()
    for line in (
        "Left out: 2 empty:\n  {}/empty.txt\n  {}/lines.jsonl:4\n",
        "Left out: 1 binary:\n  {}/picture.png\n",
        "Repaired: 1 not UTF-8, with bytes replaced; decode with --encoding NAME:\n  {}/lat",
    ):
        assert line.replace("{}", str(corpus)) in shown.out
    assert "encoding" in shown.err
    args = parser.parse_args(["data", "inspect", out, "--samples", "2"])
    assert args.run(args) == 0
    shown = capsys.readouterr()
    assert shown.out.count("train document ") == 3  # the histogram's title and two samples
    assert "█" in shown.out
    assert "…" not in shown.out.split("train document ")[-1], "a whole document ends with no mark"
    monkeypatch.setattr(commands, "_SAMPLE_TOKENS", 4)
    assert args.run(args) == 0
    assert capsys.readouterr().out.rstrip().endswith("…"), "one that is cut does"
    args = parser.parse_args(["data", "inspect", out, "--rows", "2", "--seq-length", "32"])
    assert args.run(args) == 0
    assert capsys.readouterr().out.count("documents in 32 tokens") == 2
    args = parser.parse_args(["data", "inspect", out, "--rows", "1"])
    with pytest.raises(UserError, match="A row of 4,096 tokens: the train split of"):
        args.run(args)


@pytest.mark.parametrize(
    ("opening", "shown"),
    [
        ("# Title\n\nSome wor", "# Title\n…"),
        ("one long li", "one long li…"),
        ("\n\none long li", "one long li…"),
        ("a whole line\n", "a whole line\n…"),
    ],
)
def test_a_document_that_is_cut_ends_with_a_mark(opening: str, shown: str) -> None:
    assert commands.whole_lines(opening) == shown
