from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_megacpp.data import shards
from nemo_megacpp.data.corpus import (
    NAMED,
    Reading,
    Tally,
    find_files,
)
from nemo_megacpp.data.documents import iter_documents
from nemo_megacpp.errors import UserError
from tests.data.reading import read


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
