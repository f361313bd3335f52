from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from nemo_megacpp.data import shards
from nemo_megacpp.data.corpus import (
    NAMED,
    Document,
    Reading,
    Tally,
    check_encoding,
    find_files,
    iter_documents,
)
from nemo_megacpp.errors import UserError


def read(*paths: Path, **reading: Any) -> tuple[list[Document], Tally]:
    """Read all documents, and what was left out."""
    tally = Tally()
    files = find_files(paths, tally)
    return list(iter_documents(files, Reading(**reading), tally)), tally


def test_reads_every_document_once_and_names_the_rest(corpus: Path, texts: dict[str, str]) -> None:
    found, tally = read(corpus, corpus / "a.md")
    assert {d.key: d.text for d in found} == texts
    assert len(found) == len(texts)
    assert all(d.size == len(d.text.encode()) for d in found)
    assert tally.counts == {"empty": 2, "binary": 1, "bad_utf8": 1}
    assert tally.names == {
        "empty": [f"{corpus}/empty.txt", f"{corpus}/lines.jsonl:4"],
        "binary": [f"{corpus}/picture.png"],
        "bad_utf8": [f"{corpus}/latin.txt (perhaps cp1252)"],
    }


def test_named_hidden_file_is_read_and_output_is_ignored(corpus: Path) -> None:
    (named,) = find_files([corpus / ".secret.txt"], Tally())
    assert named.key == ".secret.txt"
    keys = {file.key for file in find_files([corpus], Tally(), exclude=corpus / "sub")}
    assert "a.md" in keys
    assert not any(key.startswith(("sub/", ".")) for key in keys)


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "is not JSON: Expecting value in column 9."),
        ("[1]", "is a JSON list, not an object with a text."),
        ('{"txt": "a"}', "has no field 'text'; its fields: txt. Did you mean 'txt'?"),
        ('{"text": 5}', "has a int in field 'text', not a string."),
        ("\0\0\0", "is not JSON: it has NUL bytes."),
    ],
)
def test_bad_json_line_is_named_and_skipped(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n' + line + '\n{"text": "fine, too"}\n')
    found, tally = read(tmp_path)
    assert [d.key for d in found] == ["x.jsonl:1", "x.jsonl:3"]
    assert tally.names["bad_file"] == [f"{path}:2 {message}"]
    path.write_text((line + "\n") * 1200)
    _, tally = read(tmp_path)
    assert tally.counts == {"bad_line": 1200, "bad_file": 1}
    (named,) = tally.names["bad_file"]
    assert named == f"{path}:1 {message} (1,199 more malformed lines in this file)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "has a number of too many digits."),
        ("[" * 500_000, "is not JSON: it is nested too deeply."),
        ('{"text": "a", "n": 1e999999999}', None),
        ("{" + ", ".join(f'"{n:0500}": 1' for n in range(2000)) + "}", "has no field 'text'"),
        ('{"text": "a", "b": "' + "x" * 200_000 + '"}', None),
    ],
)
def test_hostile_lines_are_skipped_and_named(
    tmp_path: Path, line: str, message: str | None
) -> None:
    source = tmp_path / "lines.jsonl"
    source.write_text(line + '\n{"text": "next"}\n')
    found, tally = read(source)
    assert [document.text for document in found] == ["a", "next"][message is not None :]
    names = tally.names.get("bad_file", [])
    if message is None:
        assert not names
    else:
        assert message in names[0] and names[0].startswith(f"{source}:1 ") and len(names[0]) < 1500


def test_pipes_sockets_and_devices_are_not_opened(tmp_path: Path) -> None:
    """Opening a pipe waits for a writer."""
    folder, pipe = tmp_path / "folder", tmp_path / "pipe.txt"
    folder.mkdir()
    os.mkfifo(pipe)
    (tmp_path / "link.txt").symlink_to(pipe)
    for path, kind in (
        (pipe, "a named pipe"),
        (tmp_path / "link.txt", "a named pipe"),
        (Path("/dev/zero"), "a device"),
    ):
        with pytest.raises(UserError, match=f"Input '{path}' is {kind}, not a file"):
            find_files([path], Tally())
    (folder / "a.txt").write_text("text")
    os.mkfifo(folder / "b.txt")
    (folder / "c.txt").symlink_to(pipe)
    (folder / "d.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "e.txt"))
    found, tally = read(folder)
    assert [document.text for document in found] == ["text"]
    assert tally.names["bad_file"] == [
        f"'{folder / name}.txt' is {kind}, not a file."
        for name, kind in zip(
            "bcde", ("a named pipe", "a named pipe", "a device", "a socket"), strict=True
        )
    ]


def test_names_are_limited(tmp_path: Path) -> None:
    tallies = [Tally(), Tally()]
    for number in range(2 * NAMED):
        tallies[number % 2].note("empty", str(number))
    tallies[0].add(tallies[1])
    assert tallies[0].counts == {"empty": 2 * NAMED}
    assert tallies[0].names == {"empty": [str(number) for number in range(0, 2 * NAMED, 2)]}


def test_text_key(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "b", "text": "t"}\n')
    assert [d.text for d in read(tmp_path, text_key="body")[0]] == ["b"]


def test_missing_input_is_refused_and_unreadable_input_is_named(tmp_path: Path) -> None:
    message = r"Input '.*missing\.txt', '.*lost' do not exist"
    with pytest.raises(UserError, match=message):
        find_files([tmp_path / "missing.txt", tmp_path, tmp_path / "lost"], Tally())
    with pytest.raises(UserError, match="No files in"):
        find_files([tmp_path], Tally())
    with pytest.raises(UserError, match="at least one file or folder"):
        find_files([], Tally())
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    tally = Tally()
    assert find_files([tmp_path], tally) == []
    assert tally.names == {
        "bad_file": [f"Cannot read '{tmp_path}/gone': No such file or directory."]
    }


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


def test_shards_hold_every_document_once(
    corpus: Path, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 50)
    monkeypatch.setattr(shards, "_CHUNK", 7)
    lines = {f"long.jsonl:{n}": f"{n} words" + "!" * (n % 40) for n in range(1, 60)}
    text = "".join(json.dumps({"text": text}) + "\n" for text in lines.values())
    (tmp_path / "long.jsonl").write_text(text)
    found = find_files([corpus, tmp_path / "long.jsonl"], Tally())
    made = shards.cut(found)
    assert [shard.number for shard in made] == list(range(len(made)))
    assert sum(shard.size for shard in made) == sum(file.size for file in found)
    assert len([1 for shard in made if shard.files[0].key == "long.jsonl"]) > 10
    documents = [d for shard in made for d in iter_documents(shard.files, Reading())]
    assert [d.key for d in documents] == [d.key for d in iter_documents(found, Reading())]
    assert {d.key: d.text for d in documents} == texts | lines


@pytest.mark.processes
def test_preparing_loads_neither_torch_nor_megatron(corpus: Path, tmp_path: Path) -> None:
    code = (
        "import sys, nemo_megacpp.commands.data\n"
        "heavy = {'torch', 'tokenizers', 'megatron', 'numpy', 'pydantic'}\n"
        "print(heavy & set(sys.modules) or 'none')\n"
        "from nemo_megacpp.data.prepare import prepare\n"
        "prepare(sys.argv[1:2], sys.argv[2], vocab_size=300, progress=False)\n"
        "print({'torch', 'megatron'} & set(sys.modules) or 'none')"
    )
    command = [sys.executable, "-c", code, str(corpus), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["none", "none"]
