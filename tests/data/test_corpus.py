from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pytest

from nemo_megacpp.data import shards
from nemo_megacpp.data.corpus import find_files, iter_documents, torch_headers
from nemo_megacpp.errors import UserError


def test_reads_every_document_once_and_counts_the_rest(corpus: Path, texts: dict[str, str]) -> None:
    counts: Counter[str] = Counter()
    found = list(iter_documents(find_files([corpus, corpus / "a.md"]), counts=counts))
    assert {d.key: d.text for d in found} == texts
    assert len(found) == len(texts)
    assert all(d.size == len(d.text.encode()) for d in found)
    assert counts == {"empty": 2, "binary": 1, "bad_utf8": 1}


def test_named_hidden_file_is_read_and_output_is_passed_over(corpus: Path) -> None:
    (named,) = find_files([corpus / ".secret.txt"])
    assert named.key == ".secret.txt"
    keys = {file.key for file in find_files([corpus], exclude=corpus / "sub")}
    assert "a.md" in keys
    assert not any(key.startswith(("sub/", ".")) for key in keys)


def test_mostly_undecodable_file_is_binary(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(128, 256)) + b"ab")
    counts: Counter[str] = Counter()
    assert list(iter_documents(find_files([tmp_path]), counts=counts)) == []
    assert counts == {"binary": 1}


def test_byte_order_mark_and_half_surrogates(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "a\\ud800b"}\n')
    counts: Counter[str] = Counter()
    texts = [d.text for d in iter_documents(find_files([tmp_path]), counts=counts)]
    assert texts == ["one", "a?b"]
    assert counts == {"bad_utf8": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"x\.jsonl:2 is not JSON"),
        ("[1]", r"x\.jsonl:2 is a JSON list"),
        ('{"txt": "a"}', r"x\.jsonl:2 has no field 'text'; its fields: txt\. Did you mean 'txt'"),
        ('{"text": 5}', r"x\.jsonl:2: field 'text' is a int"),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        list(iter_documents(find_files([tmp_path])))


def test_text_key(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "b", "text": "t"}\n')
    assert [d.text for d in iter_documents(find_files([tmp_path]), text_key="body")] == ["b"]


def test_unreadable_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.txt' does not exist"):
        find_files([tmp_path / "missing.txt"])
    with pytest.raises(UserError, match="No files in"):
        find_files([tmp_path])
    with pytest.raises(UserError, match="at least one file or folder"):
        find_files([])
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"Cannot read .*gone'"):
        find_files([tmp_path])


def cut(raw: bytes) -> bytes:
    return raw[:-12]


def foreign(raw: bytes) -> bytes:
    return b"text" + raw


@pytest.mark.parametrize("damage", [cut, foreign])
@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_broken_stream_is_named(tmp_path: Path, suffix: str, damage) -> None:
    compress = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda raw: pyarrow.Codec("zstd").compress(raw, asbytes=True),
    }[suffix]
    path = tmp_path / f"x.txt.{suffix}"
    path.write_bytes(damage(compress(bytes(range(1, 120)) * 50)))
    with pytest.raises(UserError, match=rf"Cannot read .*x\.txt\.{suffix}"):
        list(iter_documents(find_files([path])))


def test_huge_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 41)
    (tmp_path / "b.txt").write_text("x" * 40)
    lines = ['{"text": "one"}', json.dumps({"text": "y" * 100}), '{"text": "three"}', "z" * 99]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    counts: Counter[str] = Counter()
    found = iter_documents(find_files([tmp_path]), max_document_bytes=40, counts=counts)
    assert {d.key: d.size for d in found} == {"b.txt": 40, "c.jsonl:1": 3, "c.jsonl:3": 5}
    assert counts == {"huge": 3}


def test_shards_hold_every_document_once(
    corpus: Path, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 50)
    monkeypatch.setattr(shards, "_CHUNK", 7)
    lines = {f"long.jsonl:{n}": f"{n} words" + "!" * (n % 40) for n in range(1, 60)}
    text = "".join(json.dumps({"text": text}) + "\n" for text in lines.values())
    (tmp_path / "long.jsonl").write_text(text)
    found = find_files([corpus, tmp_path / "long.jsonl"])
    made = shards.cut(found)
    assert [shard.number for shard in made] == list(range(len(made)))
    assert sum(shard.size for shard in made) == sum(file.size for file in found)
    assert len([1 for shard in made if shard.files[0].key == "long.jsonl"]) > 10
    documents = [d for shard in made for d in iter_documents(shard.files)]
    assert [d.key for d in documents] == [d.key for d in iter_documents(found)]
    assert {d.key: d.text for d in documents} == texts | lines


@pytest.mark.processes
def test_torch_headers_without_importing_torch() -> None:
    assert (torch_headers() / "torch").is_dir()
    code = (
        "import sys, nemo_megacpp.commands.data\n"
        "from nemo_megacpp.data.corpus import torch_headers\n"
        "torch_headers()\n"
        "print({'torch', 'tokenizers', 'megatron', 'numpy'} & set(sys.modules) or 'none')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"
