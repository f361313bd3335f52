"""Files read one document at a time: broken streams and huge ones."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pytest

from tests.data.reading import read


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
    found, tally = read(path)
    assert found == []
    (named,) = tally.names["bad_file"]
    assert named.startswith(f"Cannot read '{path}': ")


def test_lines_before_the_break_of_a_stream_are_read(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{number} {number**9}"}) for number in range(20_000)]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(["[]", *lines]).encode())[:-1000])
    found, tally = read(path)
    assert 10_000 < len(found) < 20_000
    (named,) = tally.names["bad_file"]
    assert f"{path}:1 is a JSON list, not an object with a text. Cannot read '{path}'" in named


def test_huge_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 41)
    (tmp_path / "b.txt").write_text("x" * 40)
    lines = ['{"text": "one"}', json.dumps({"text": "y" * 100}), '{"text": "three"}', "z" * 99]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    found, tally = read(tmp_path, max_document_bytes=40)
    assert {d.key: d.size for d in found} == {"b.txt": 40, "c.jsonl:1": 3, "c.jsonl:3": 5}
    assert tally.counts == {"huge": 3}
    assert tally.names["huge"][1:] == [f"{tmp_path}/c.jsonl:2", f"{tmp_path}/c.jsonl:4"]
