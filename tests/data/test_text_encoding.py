"""Text that is not UTF-8: named, and decoded if its encoding is given."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nemo_megacpp.data.text_encoding import check_encoding
from nemo_megacpp.errors import UserError
from tests.data.reading import read


def test_byte_order_mark_and_half_surrogates(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "a\\ud800b"}\n')
    found, tally = read(tmp_path)
    assert [d.text for d in found] == ["one", "a?b"]
    assert tally.counts == {"bad_utf8": 1}


RUSSIAN = "Привет, мир! Сегодня хорошая погода, и мы пойдём гулять в парк.\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.jsonl.gz"])
def test_unicode_with_a_byte_order_mark_is_decoded(
    tmp_path: Path, name: str, encoding: str
) -> None:
    # U+0A0A and U+0D0A hold the byte of a newline in UTF-16.
    texts = [RUSSIAN, "one ਊ ഊ two"] if "jsonl" in name else [RUSSIAN]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    raw = ("\n".join(lines) if "jsonl" in name else RUSSIAN).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    found, tally = read(tmp_path)
    assert [d.text for d in found] == texts
    assert not tally.counts


def test_another_encoding_is_named_and_decoded_if_it_is_given(tmp_path: Path) -> None:
    texts = {"a.txt": RUSSIAN, "b.txt": "In UTF-8: " + RUSSIAN, "c.jsonl:1": RUSSIAN}
    (tmp_path / "a.txt").write_bytes(texts["a.txt"].encode("cp1251"))
    (tmp_path / "b.txt").write_text(texts["b.txt"], encoding="utf-8")
    line = json.dumps({"text": RUSSIAN}, ensure_ascii=False)
    (tmp_path / "c.jsonl").write_bytes(line.encode("cp1251"))
    (tmp_path / "d.bin").write_bytes(b"\0" + RUSSIAN.encode("cp1251"))
    found, tally = read(tmp_path)
    assert [d.key for d in found] == ["b.txt"]
    assert tally.counts == {"not_utf8": 2, "binary": 1}
    assert tally.names["not_utf8"] == [
        f"{tmp_path}/a.txt (perhaps cp1251)",
        f"{tmp_path}/c.jsonl:1 (perhaps cp1251)",
    ]
    found, tally = read(tmp_path, encoding="cp1251")
    assert {d.key: d.text for d in found} == texts
    assert tally.counts == {"binary": 1}
    # Bytes that the given encoding does not have.
    (tmp_path / "a.txt").write_bytes(b"\x98" * 30)
    assert read(tmp_path, encoding="cp1251")[1].counts["not_utf8"] == 1


def test_utf16_without_a_byte_order_mark_needs_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("some words".encode("utf-16-le"))
    (tmp_path / "b.jsonl").write_bytes('{"text": "a"}\n{"text": "ਊ"}\n'.encode("utf-16-le"))
    (tmp_path / "c.png").write_bytes(b"\x89PNG\0\0\0\0text")
    assert read(tmp_path)[1].counts == {"binary": 2, "bad_line": 4, "bad_file": 1}
    found, tally = read(tmp_path, encoding="utf-16-le")
    assert [d.text for d in found] == ["some words", "a", "ਊ"]
    assert tally.counts == {"binary": 1}


def test_encodings() -> None:
    assert check_encoding("Latin-1") == "iso8859-1"
    for name in ("lattin-1", "base64"):
        with pytest.raises(UserError, match=f"--encoding {name} is not a text encoding that"):
            check_encoding(name)
    with pytest.raises(UserError, match="--encoding iso-2022-jp writes text in ASCII bytes"):
        check_encoding("iso-2022-jp")
