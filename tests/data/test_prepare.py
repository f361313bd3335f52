from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets import indexed_dataset

from nemo_megacpp.data import encode as encode_module
from nemo_megacpp.data import prepare as prepare_module
from nemo_megacpp.data.prepare import prepare
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.data.tokenizer import load_tokenizer, train_tokenizer
from nemo_megacpp.errors import UserError


def decoded(data: PreparedData, prefix: str) -> list[str]:
    """Read documents through Megatron's own reader and check how each ends."""
    dataset = indexed_dataset.IndexedDataset(prefix)
    assert dataset.index.dtype is np.uint16
    assert len(dataset.document_indices) == len(dataset) + 1
    tokenizer = load_tokenizer(data.tokenizer_dir).tokenizer
    texts = []
    for i in range(len(dataset)):
        ids = dataset[i].tolist()
        assert ids[-1] == data.eos_id
        assert data.eos_id not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1], skip_special_tokens=False))
    return texts


def run(corpus: Path, out: Path, **options) -> PreparedData:
    return prepare(
        [corpus], out, **{"vocab_size": 300, "held_out": 0.3, "progress": False} | options
    )


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_tokens_round_trip_through_megatron(prepared: PreparedData, texts: dict[str, str]) -> None:
    train = decoded(prepared, prepared.train_prefix)
    held = decoded(prepared, prepared.heldout_prefix)
    assert sorted(train + held) == sorted(texts.values())
    assert (prepared.splits["train"].documents, prepared.splits["heldout"].documents) == (
        len(train),
        len(held),
    )
    assert min(len(train), len(held)) >= 1
    assert prepared.skipped == {"empty": 2, "binary": 1, "bad_utf8": 1}
    assert prepared.splits["heldout"].bytes == sum(len(text.encode()) for text in held)
    assert prepared.vocab_size == 300
    assert (
        prepared.tokens
        == indexed_dataset.IndexedDataset(prepared.train_prefix).sequence_lengths.sum()
    )


def test_same_request_gives_the_same_files(
    corpus: Path, prepared: PreparedData, tmp_path: Path
) -> None:
    run(corpus, tmp_path / "again")
    assert files(tmp_path / "again") == files(prepared.root)


def test_reuse_refusal_and_overwrite(
    corpus: Path, texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(corpus, source)
    first = run(source, out)
    before = (out / "train.bin").stat().st_mtime_ns
    assert run(source, out) == first
    assert capsys.readouterr().out.startswith(f"Reusing {out}: {first.tokens} tokens")
    assert (out / "train.bin").stat().st_mtime_ns == before

    with pytest.raises(UserError, match=r"vocab_size 300 \(now 290\)\. Name another folder"):
        run(source, out, vocab_size=290)
    (source / "new.txt").write_text("a new document of words")
    with pytest.raises(UserError, match="different: the source files"):
        run(source, out)
    second = run(source, out, overwrite=True)
    documents = sum(split.documents for split in second.splits.values())
    assert documents == len(texts) + 1
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_left_alone(
    corpus: Path, tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not prepared data, so it is not replaced"):
        run(corpus, tmp_path, overwrite=overwrite)
    (tmp_path / "data.json").write_text('{"format": "another"}')
    with pytest.raises(UserError, match="is not prepared data, so it is not replaced"):
        run(corpus, tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_output_inside_the_input(corpus: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(corpus, source)
    (source / "out").mkdir()  # an empty folder may be filled
    first = run(source, source / "out")
    assert run(source, source / "out") == first


def test_existing_tokenizer(corpus: Path, prepared: PreparedData, tmp_path: Path) -> None:
    folder = prepared.tokenizer_dir
    data = run(corpus, tmp_path / "out", tokenizer=folder, vocab_size=None, held_out=0.5)
    assert data.tokenizer_fingerprint == prepared.tokenizer_fingerprint
    assert data.vocab_size == 300
    with pytest.raises(UserError, match="has 300 tokens, not 512"):
        run(corpus, tmp_path / "other", tokenizer=folder, vocab_size=512)


def test_vocabulary_that_the_text_cannot_fill(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"too short for a vocabulary of 5000: .* yield \d+ tokens"):
        run(corpus, tmp_path / "out", vocab_size=5000)
    data = run(corpus, tmp_path / "out", vocab_size=None)
    assert 258 < data.vocab_size < 5000
    assert f"Vocabulary: {data.vocab_size} tokens" in capsys.readouterr().out


@pytest.fixture
def bad(corpus: Path, tmp_path: Path) -> Path:
    """`corpus` with bad files among the good ones."""
    folder = tmp_path / "bad"
    shutil.copytree(corpus, folder)
    whole = (folder / "more.jsonl.gz").read_bytes()
    (folder / "cut.jsonl.gz").write_bytes(whole[:-9])
    (folder / "gone").symlink_to(folder / "nowhere")
    for number in range(12):
        lines = [f'{{"text": "line of file {number}"}}', "{", '{"text": 1}']
        (folder / f"lines{number:02}.jsonl").write_text("\n".join(lines))
    return folder


def test_all_bad_files_are_named_at_once(bad: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        run(bad, tmp_path / "out")
    first, *listed, more, advice = str(refused.value).splitlines()
    assert first == "14 input files are unreadable or malformed:"
    assert listed[0] == f"  Cannot read '{bad}/gone': No such file or directory."
    assert listed[1].startswith(f"  Cannot read '{bad}/cut.jsonl.gz': ")
    in_json = "is not JSON: Expecting property name enclosed in double quotes in column 2."
    assert listed[2:] == [
        f"  {bad}/lines{number:02}.jsonl:2 {in_json} (1 more malformed lines in this file)"
        for number in range(8)
    ]
    assert more == "  and 4 more"
    assert advice == "Repair them, or skip what is bad in them with --skip-bad."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_bad_files_are_skipped_counted_and_named(
    bad: Path, prepared: PreparedData, texts: dict[str, str], tmp_path: Path
) -> None:
    data = run(bad, tmp_path / "out", skip_bad=True)
    found = decoded(data, data.train_prefix) + decoded(data, data.heldout_prefix)
    more = [f"line of file {number}" for number in range(12)]
    assert sorted(found) == sorted([*texts.values(), *more])
    assert data.skipped == {**prepared.skipped, "bad_file": 14, "bad_line": 24}
    assert data.skipped_names["bad_file"][0].startswith(f"Cannot read '{bad}/gone'")
    assert run(bad, tmp_path / "out", skip_bad=True) == data
    with pytest.raises(UserError, match=r"different: skip_bad True \(now False\)"):
        run(bad, tmp_path / "out")


def test_a_cause_of_very_many_bad_files_ends_the_survey_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_megacpp.data.shards.SHARD_BYTES", 200)
    monkeypatch.setattr(prepare_module, "MAX_BAD", 20)
    for number in range(30):
        (tmp_path / f"{number:02}.jsonl").write_text('{"body": "some text"}\n' * 5)
    with pytest.raises(UserError, match=r"(?s)At least 4 input files are .* has no field 'text'"):
        run(tmp_path, tmp_path / "out")
    assert run(tmp_path, tmp_path / "out", text_key="body", vocab_size=260).tokens


def test_an_encoding(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        (tmp_path / "in" / f"{number}.txt").write_bytes(f"Größe {number} äöü".encode("cp1252"))
    with pytest.raises(
        UserError, match=r"(?s)0 document\(s\) of text found; .*Left out: 4 not UTF-8; decode with"
    ):
        run(tmp_path / "in", tmp_path / "out")
    data = run(tmp_path / "in", tmp_path / "out", encoding="windows-1252", vocab_size=260)
    found = decoded(data, data.train_prefix) + decoded(data, data.heldout_prefix)
    assert sorted(found) == [f"Größe {number} äöü" for number in range(4)]
    assert data.request["encoding"] == "cp1252"


def test_index_is_that_of_megatrons_builder(prepared: PreparedData, tmp_path: Path) -> None:
    theirs = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16)
    for ids in indexed_dataset.IndexedDataset(prepared.train_prefix):
        theirs.add_document(ids, [len(ids)])
    theirs.finalize(str(tmp_path / "x.idx"))
    for suffix in ("bin", "idx"):
        ours = Path(f"{prepared.train_prefix}.{suffix}").read_bytes()
        assert ours == (tmp_path / f"x.{suffix}").read_bytes()


def test_size_cap(corpus: Path, tmp_path: Path) -> None:
    data = run(corpus, tmp_path / "out", max_bytes=300, vocab_size=270)
    assert 200 < sum(split.bytes for split in data.splits.values()) <= 300


@pytest.mark.parametrize("error", [RuntimeError("broken"), OSError(28, "full")])
def test_failure_midway_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(encode_module, "_batches", fail)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        run(corpus, tmp_path / "deep" / "er" / "out")
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_keeps_the_old_data(
    corpus: Path, prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared.root, out)
    before = files(out)

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode_module, "_batches", fail)
    with pytest.raises(UserError, match=r"Cannot write .*out': No space left on device"):
        run(corpus, out, overwrite=True, vocab_size=290)
    assert files(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 0.0}, "held-out share is 0.0"),
        ({"held_out": 1.0}, "held-out share is 1.0"),
        ({"max_bytes": 0}, "max_bytes is 0; it must be at least 1"),
        ({"vocab_size": 10}, "vocabulary of 10 is too small"),
        ({"max_document_bytes": 1 << 31}, "at most 1,073,741,824, Megatron"),
        ({"document_multiple": 0}, "document_multiple is 0"),
        ({"num_workers": 0}, "workers is 0"),
    ],
)
def test_bad_arguments(corpus: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(corpus, tmp_path / "out", **options)


def test_tokenizer_is_trained_on_part_of_a_large_corpus(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prepare_module, "TOKENIZER_BYTES", 100)
    data = run(corpus, tmp_path / "out", vocab_size=260)
    assert f"of {data.splits['train'].bytes:,} bytes" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "data.json").read_text())["vocab_size"] == 260


def test_tokenizer_never_sees_held_out_text(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(texts, vocab_size):
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(prepare_module, "train_tokenizer", spy)
    data = run(corpus, tmp_path / "out")
    assert sorted(seen) == sorted(decoded(data, data.train_prefix))


def test_overwrite_through_a_link_keeps_the_link(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    run(corpus, tmp_path / "out")
    second = run(corpus, tmp_path / "out", vocab_size=290, overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert PreparedData.open(tmp_path / "disk").splits == second.splits
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "out"}
