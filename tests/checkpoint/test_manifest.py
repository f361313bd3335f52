"""A checkpoint that is not what was saved is refused, by file and tensor."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from nemo_megacpp.checkpoint import manifest
from nemo_megacpp.checkpoint.identity import write_identity
from nemo_megacpp.checkpoint.manifest import FILE, check_manifest, is_complete, write_manifest
from nemo_megacpp.errors import UserError

TENSORS = {f"layer.{index}.weight": (40 + index, 50) for index in range(12)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint in torch's own format, with a manifest, as a run folder holds it."""
    folder = tmp_path / "step=20"
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(size, generator=generator) for name, size in TENSORS.items()}
    dcp.save(
        {**state, "note": {"of": "a run"}}, checkpoint_id=str(folder / "weights"), no_dist=True
    )
    (folder / "nemo_megacpp.json").write_text("{}")
    write_manifest(folder)
    return folder


def data_file(folder: Path) -> Path:
    return next((folder / "weights").glob("*.distcp"))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_what_was_saved_is_verified(saved: Path) -> None:
    names = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    size = sum((saved / name).stat().st_size for name in names - {FILE})
    assert check_manifest(saved) == f"3 files, {size:,} bytes, contents verified"
    partly = check_manifest(saved, full=False)
    assert partly == f"3 files, {size:,} bytes, sizes match, contents not read"
    assert is_complete(saved)
    assert not list(saved.rglob("*.partial"))


def test_a_second_manifest_replaces_the_first(saved: Path) -> None:
    before = (saved / FILE).read_bytes()
    write_manifest(saved)
    assert (saved / FILE).read_bytes() == before
    (saved / "weights" / "more").write_text("x")
    write_manifest(saved)
    assert check_manifest(saved).startswith("4 files, ")


def test_every_byte_counts_and_names_its_tensor(saved: Path) -> None:
    """Bytes all over the file, and the first and last of every tensor."""
    file = data_file(saved)
    whole = file.read_bytes()
    storage = FileSystemReader(saved / "weights").read_metadata().storage_data
    owners = {
        offset: index.fqn
        for index, place in storage.items()
        for offset in (place.offset, place.offset + place.length - 1)
    }
    somewhere = random.Random(5).sample(range(len(whole)), 40)
    for offset in [*owners, *somewhere]:
        flip(file, offset)
        with pytest.raises(UserError) as refusal:
            check_manifest(saved)
        named = re.search(r"bytes ([\d,]+) to ([\d,]+) \(of (\S+)\)\.$", str(refusal.value))
        assert named, refusal.value
        assert int(named[1].replace(",", "")) <= offset <= int(named[2].replace(",", ""))
        assert named[3] == owners.get(offset, named[3])
        assert f"weights/{file.name} has changed" in str(refusal.value)
        assert is_complete(saved), "contents are not read for that"
        file.write_bytes(whole)
    check_manifest(saved)


def test_a_large_tensor_is_checked_in_blocks(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(manifest, "_READ", 300)
    monkeypatch.setattr(manifest, "_BATCH", 5000)
    write_manifest(saved)
    blocks = json.loads((saved / FILE).read_text())["files"][f"weights/{data_file(saved).name}"]
    assert max(length for _, length, _, _ in blocks["blocks"]) == 1000
    assert sum(length for _, length, _, _ in blocks["blocks"]) == blocks["size"]
    check_manifest(saved)
    place = next(
        place
        for index, place in FileSystemReader(saved / "weights").read_metadata().storage_data.items()
        if index.fqn == "layer.7.weight"
    )
    flip(data_file(saved), place.offset + 3456)
    begin, end = place.offset + 3000, place.offset + 3999
    with pytest.raises(UserError, match=rf"bytes {begin:,} to {end:,} \(of layer\.7\.weight\)"):
        check_manifest(saved)


def test_damage_to_many_tensors_is_summed_up(saved: Path) -> None:
    file = data_file(saved)
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match=r"and 12 other blocks \(of .*, .*, .* and 10 more\)"):
        check_manifest(saved)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda folder: data_file(folder).write_bytes(data_file(folder).read_bytes()[:-1]),
        r"weights/__0_0\.distcp has [\d,]+ bytes instead of [\d,]+ \(of \S+\)\.",
    ),
    "longer": (
        lambda folder: data_file(folder).open("ab").write(b"x"),
        r"weights/__0_0\.distcp has [\d,]+ bytes instead of [\d,]+\.",
    ),
    "missing": (
        lambda folder: data_file(folder).unlink(),
        r"weights/__0_0\.distcp is missing \(of .* and 10 more\)",
    ),
    "metadata missing": (
        lambda folder: (folder / "weights" / ".metadata").unlink(),
        r"weights/\.metadata is missing\.",
    ),
    "identity missing": (
        lambda folder: (folder / "nemo_megacpp.json").unlink(),
        r"nemo_megacpp\.json is missing\.",
    ),
    "foreign": (
        lambda folder: (folder / "weights" / "__9_9.distcp").write_bytes(b""),
        r"weights/__9_9\.distcp is foreign",
    ),
    "foreign folder": (
        lambda folder: (folder / "context").symlink_to("/"),
        r"context is foreign",
    ),
    "damaged manifest": (
        lambda folder: flip(folder / FILE, (folder / FILE).stat().st_size // 2),
        rf"{FILE} is damaged: ",
    ),
    "truncated manifest": (
        lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-9]),
        rf"{FILE} is damaged: ",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_neither_complete_nor_loaded(kind: str, saved: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(saved)
    with pytest.raises(UserError, match=message):
        check_manifest(saved)
    assert not is_complete(saved)


def test_everything_wrong_is_listed(saved: Path) -> None:
    data_file(saved).unlink()
    (saved / "nemo_megacpp.json").write_text("{ }")
    (saved / "x").touch()
    with pytest.raises(UserError) as refusal:
        check_manifest(saved)
    for part in ("has 3 bytes instead of 2", "distcp is missing", "x is foreign"):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_without_a_manifest_nothing_is_said_to_be_verified(saved: Path) -> None:
    (saved / FILE).unlink()
    (saved / "nemo_megacpp.json").unlink()  # else it is a checkpoint of ours
    for full in (True, False):
        assert check_manifest(saved, full=full).startswith("no manifest")
    assert not is_complete(saved)


def test_a_manifest_that_was_removed_is_missed(saved: Path) -> None:
    (saved / FILE).unlink()
    write_identity(saved, {"model": {}, "tokenizer": None, "manifest": FILE}, 20)
    for full in (True, False):
        with pytest.raises(UserError, match="has no manifest, and was saved with one"):
            check_manifest(saved, full=full)


def test_a_save_that_ended_before_the_rename_is_not_complete(saved: Path) -> None:
    (saved / FILE).rename(saved / f"{FILE}.partial")
    assert not is_complete(saved)


def test_another_schema_is_refused_not_guessed(saved: Path) -> None:
    content = json.loads((saved / FILE).read_text())
    del content["own_checksum"]
    content["schema"] = 2
    content["own_checksum"] = manifest._own_checksum(content)
    (saved / FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"has schema 2 .* reads schema 1"):
        check_manifest(saved)


def _first_block(content: Any, value: object) -> None:
    next(iter(content["files"].values()))["blocks"][0] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(files=[]), "files should be an object, and is []"),
        (lambda content: content["files"].update(x=3), "files.x should be an object, and is 3"),
        (lambda content: content["files"].update(x={"size": 1}), "files.x.blocks: field required"),
        (lambda content: _first_block(content, [0, 5]), "field required"),
        (lambda content: _first_block(content, [0, "5", "", ""]), "valid integer, and is '5'"),
        (lambda content: _first_block(content, [10**30, 1, "", ""]), "less than or equal to"),
        (lambda content: _first_block(content, [7, 1, "", ""]), "its blocks do not cover"),
        (
            lambda content: content["files"].update(x={"size": 9, "blocks": []}),
            "its blocks do not cover x",
        ),
    ],
)
def test_a_manifest_of_another_shape_is_refused_though_its_checksum_matches(
    change: Callable[[Any], object], message: str, saved: Path
) -> None:
    content = json.loads((saved / FILE).read_text())
    del content["own_checksum"]
    change(content)
    content["own_checksum"] = manifest._own_checksum(content)
    (saved / FILE).write_text(json.dumps(content))
    with pytest.raises(UserError) as refused:
        check_manifest(saved)
    assert f"{FILE} is damaged: " in str(refused.value)
    assert message in str(refused.value)
    assert not is_complete(saved)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": ' + "9" * 9999 + "}", "[]", "null"])
def test_a_manifest_that_is_no_manifest_is_refused(text: str, saved: Path) -> None:
    (saved / FILE).write_text(text)
    with pytest.raises(UserError, match=f"{FILE} is damaged: "):
        check_manifest(saved)


def test_an_unreadable_checkpoint_gets_no_manifest(saved: Path) -> None:
    (saved / FILE).unlink()
    (saved / "weights" / ".metadata").write_bytes(b"\x80\x05garbage")
    with pytest.raises(UserError, match="cannot be read"):
        write_manifest(saved)
    assert not (saved / FILE).exists()
