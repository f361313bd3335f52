"""Damage of prepared data is named by the sample before a run, `data verify` and `inspect`."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_megacpp.checkpoint import manifest
from nemo_megacpp.cli import build_parser
from nemo_megacpp.data import checksums
from nemo_megacpp.data.adopt import adopt
from nemo_megacpp.data.checksums import verify, verify_sample, write_checksums
from nemo_megacpp.data.indexed import IndexedTokens, write_index
from nemo_megacpp.data.prepared import CHECKSUMS, PreparedData
from nemo_megacpp.errors import UserError


@pytest.fixture
def copy(prepared: PreparedData, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.root, tmp_path / "data"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def refusal(folder: Path) -> str:
    """What ``data verify`` says, which the sample says too."""
    with pytest.raises(UserError) as refused:
        verify(PreparedData.open(folder))
    with pytest.raises(UserError):
        verify_sample([PreparedData.open(folder)])
    message = str(refused.value)
    assert "\n" not in message and len(message) < 1000
    return message


def test_whole_data_are_verified(prepared: PreparedData) -> None:
    found = verify(prepared)
    files = [path for path in prepared.root.rglob("*") if path.is_file()]
    assert found.blocks == found.of == len(files) - 1
    assert found.bytes == sum(p.stat().st_size for p in files if p.name != CHECKSUMS)
    assert verify_sample([prepared, prepared]).startswith(f"data: verified {2 * found.of} of ")


@pytest.mark.parametrize(
    "name", ["train.bin", "heldout.bin", "tokenizer/tokenizer_config.json", "data.json"]
)
def test_a_flipped_bit_is_seen(copy: Path, name: str) -> None:
    if name == "data.json":  # one that is valid JSON of the declared shape
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace('"held_out": 0.3', '"held_out": 0.4'))
    else:
        flip(copy / name, -7)
    size = (copy / name).stat().st_size
    message = refusal(copy)
    assert f"Prepared data in '{copy}' is damaged. {name} has changed in block 0 (bytes 0 to " in (
        message
    ), message
    assert f"{size - 1:,})" in message and message.endswith("--overwrite")


def test_a_reordered_index_is_seen(copy: Path) -> None:
    index = IndexedTokens.open(copy / "train")
    order = np.arange(len(index.lengths))[::-1]
    write_index(copy / "train.idx", index.dtype, index.lengths[order], index.offsets[order])
    assert "train.idx has changed in block 0" in refusal(copy)


def test_a_checksum_list_that_is_wrong(copy: Path) -> None:
    whole = (copy / CHECKSUMS).read_text()
    (copy / CHECKSUMS).write_text(whole.replace('"train.idx"', '"train.idy"'))
    assert "its own checksum does not match" in refusal(copy)
    write_checksums(copy)
    (copy / "tokenizer" / "planted.py").touch()
    assert "tokenizer/planted.py was not there when the data were made" in refusal(copy)
    (copy / "tokenizer" / "planted.py").unlink()
    (copy / "cache").mkdir()  # Megatron's own scripts leave one
    verify(PreparedData.open(copy))
    (copy / CHECKSUMS).unlink()
    with pytest.raises(UserError, match=r"is damaged\. checksums\.json is missing\. Make it again"):
        PreparedData.open(copy)


def test_ids_beyond_the_vocabulary(copy: Path) -> None:
    """Of data that were made wrong: their checksums match."""
    offsets = IndexedTokens.open(copy / "train").offsets
    with (copy / "train.bin").open("r+b") as file:
        for place in (int(offsets[2]) + 2, int(offsets[4])):
            file.seek(place)
            file.write(np.uint16(65000).tobytes())
    write_checksums(copy)
    assert "train.bin has token id 65000 in document 2, but the vocabulary has 300" in refusal(copy)


def test_a_sample_is_bounded_and_another_each_time(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (checksums, manifest):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    monkeypatch.setattr(checksums, "SAMPLE_BLOCKS", 2)
    write_checksums(copy)
    data = PreparedData.open(copy)
    found = verify(data, 2)
    assert found.blocks < found.of == verify(data).blocks
    line = verify_sample([data])
    assert line.endswith(f"; all: nemo-megacpp data verify {copy}")
    flip(copy / "train.bin", 200)

    def seen() -> bool:
        try:
            verify_sample([data])
        except UserError as error:
            assert "train.bin has changed in block 3 (bytes 192 to 2" in str(error)
            return True
        return False

    random.seed(0)
    assert {seen() for _ in range(30)} == {True, False}


def test_adopted_tokens_are_read_once_and_verified(
    prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("bin", "idx"):
        shutil.copy(prepared.root / f"train.{kind}", tmp_path / f"web.{kind}")
    web = tmp_path / "web.bin"
    data = adopt(web, tmp_path / "out", tokenizer=prepared.tokenizer_dir, progress=False)
    found = verify(data)
    assert found.of == len([p for p in data.root.rglob("*") if p.is_file()]) - 2
    stat = web.stat()
    flip(web, 10)
    os.utime(web, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "heldout.bin has changed in block 0" in refusal(data.root)


@pytest.mark.parametrize("name", ["data.json", CHECKSUMS, "train.idx", "train.bin", "tokenizer"])
def test_pipes_and_folders_in_place_of_files(copy: Path, name: str) -> None:
    path = copy / name
    if name == "tokenizer":
        path /= "tokenizer.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError):
        verify(PreparedData.open(copy))
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError):
        verify(PreparedData.open(copy))


@pytest.mark.parametrize("change", ["lengths", "offsets", "odd", "boundaries", "far"])
def test_malformed_index(copy: Path, change: str) -> None:
    index = IndexedTokens.open(copy / "train")
    lengths, offsets = index.lengths.copy(), index.offsets.copy()
    if change == "lengths":
        lengths[0] = -lengths[0]
    elif change == "boundaries":
        content = bytearray((copy / "train.idx").read_bytes())
        content[-1] ^= 1
        (copy / "train.idx").write_bytes(content)
    else:
        offsets[1] = {"offsets": -2, "odd": 1, "far": 2**63 - 2}[change]
    if change != "boundaries":
        write_index(copy / "train.idx", index.dtype, lengths, offsets)
    with pytest.raises(UserError, match=r"train\.idx is damaged: its lengths, offsets or bound"):
        PreparedData.open(copy)


def test_commands(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> int:
        args = build_parser().parse_args(["data", *words])
        return int(args.run(args))

    assert run("verify", str(copy), str(copy)) == 0
    shown = capsys.readouterr().out
    assert shown.count(f"{copy}: ") == 2 and "every id is below 300" in shown
    assert run("inspect", str(copy)) == 0
    assert "data: verified 7 of 7 blocks (" in capsys.readouterr().out
    flip(copy / "train.bin", 9)
    for command in ("verify", "inspect"):
        with pytest.raises(UserError, match=r"train\.bin has changed in block 0"):
            run(command, str(copy))
        assert not capsys.readouterr().out


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_a_mutated_manifest_gives_one_message(copy: Path, data: st.DataObject) -> None:
    """Data open as another value of the same shape, or one message names the folder."""
    path = copy / "data.json"
    if not (copy / "whole").exists():
        shutil.copy(path, copy / "whole")
    content = json.loads((copy / "whole").read_text())
    content["request"]["adopted"] = [[str(copy / "train.bin"), 1, 2]]
    where = data.draw(st.sampled_from(places(content)))
    kind = data.draw(st.sampled_from(["value", "removed", "deep", "digits", "large", "cut"]))
    marker: Any = "@@marker@@" if kind in ("deep", "digits", "large") else data.draw(VALUES)
    if not where:
        content = marker
    else:
        holder = content
        for key in where[:-1]:
            holder = holder[key]
        if kind == "removed":
            del holder[where[-1]]
        else:
            holder[where[-1]] = marker
    text = json.dumps(content)
    spelled = {"deep": "[" * 9999 + "]" * 9999, "digits": "9" * 5000, "large": "1e999"}
    text = text.replace('"@@marker@@"', spelled.get(kind, "0"))
    path.write_text(text[: len(text) // 2] if kind == "cut" else text)
    try:
        verify(PreparedData.open(copy))
    except UserError as error:
        assert str(copy) in str(error) and len(str(error)) < 1500


def test_a_pipe_or_socket_is_not_opened(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "data.json"))
        with pytest.raises(UserError, match="it is not a regular file"):
            PreparedData.open(tmp_path)
