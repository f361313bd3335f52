"""Bytes that a disk or a network has changed: flipped, cut off, exchanged, gone."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from tests.faults.doors import CHECKPOINT, DATA, EXPORT, Door
from tests.faults.judge import Outcome
from tests.faults.kinds import Kind, Site

_BLOCK = 64


def _copy(draw: random.Random, site: Site) -> tuple[Path, Path, tuple[Door, ...]]:
    """Return an intact input, a copy of it to injure, and the doors that read it."""
    place = site.place
    intact, doors = draw.choice(
        (
            (place.checkpoint(), CHECKPOINT),
            (place.checkpoint(), CHECKPOINT),
            (place.exported, EXPORT),
            (place.data.root, DATA),
        )
    )
    return intact, Path(shutil.copytree(intact, site.folder / "input")), doors


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def _flip(draw: random.Random, site: Site) -> Outcome:
    intact, copy, doors = _copy(draw, site)
    path = draw.choice(_files(copy))
    content = bytearray(path.read_bytes())
    bits = [draw.randrange(8 * len(content)) for _ in range(draw.choice((1, 1, 1, 2, 16)))]
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    what = f"{len(bits)} bits of {path.relative_to(copy)} flipped, the first {bits[0]}"
    return site.meet(draw.choice(doors), copy, what, intact)


def _truncate(draw: random.Random, site: Site) -> Outcome:
    intact, copy, doors = _copy(draw, site)
    path = draw.choice(_files(copy))
    size, how = path.stat().st_size, draw.choice(("cut", "empty", "gone", "longer", "zeros"))
    if how == "gone":
        path.unlink()
    elif how == "longer":
        with path.open("ab") as stream:
            stream.write(draw.randbytes(draw.randint(1, 4096)))
    elif how == "zeros":  # as after a power cut
        start = draw.randrange(size)
        path.write_bytes(path.read_bytes()[:start] + bytes(size - start))
    else:
        with path.open("r+b") as stream:
            stream.truncate(0 if how == "empty" else draw.randrange(size))
    what = f"{path.relative_to(copy)} ({size} bytes): {how}"
    return site.meet(draw.choice(doors), copy, what, intact)


def _swap(draw: random.Random, site: Site) -> Outcome:
    intact, copy, doors = _copy(draw, site)
    place, files = site.place, _files(copy)
    how = draw.choice(("files", "blocks", "other checkpoint"))
    if how == "other checkpoint" and intact == place.checkpoint():
        path = draw.choice(files)
        older = place.checkpoint(2) / path.relative_to(copy)
        if not older.is_file():
            older = draw.choice(_files(place.checkpoint(2)))
        shutil.copyfile(older, path)
        what = f"{path.relative_to(copy)} taken from an older checkpoint"
    elif how == "blocks":
        path = draw.choice(files)
        content = bytearray(path.read_bytes())
        size = min(_BLOCK, len(content) // 2)
        one, two = (draw.randrange(len(content) - size + 1) for _ in range(2))
        first, second = bytes(content[one : one + size]), bytes(content[two : two + size])
        content[one : one + size], content[two : two + size] = second, first
        path.write_bytes(content[: path.stat().st_size])
        what = f"{size} bytes at {one} and {two} of {path.relative_to(copy)} exchanged"
    else:
        one_path, two_path = draw.sample(files, 2)
        kept = one_path.read_bytes()
        shutil.copyfile(two_path, one_path)
        two_path.write_bytes(kept)
        what = f"{one_path.relative_to(copy)} and {two_path.relative_to(copy)} exchanged"
    return site.meet(draw.choice(doors), copy, what, intact)


def _without_manifest(draw: random.Random, site: Site) -> Outcome:
    """The manifest is gone and a byte of the weights has changed."""
    intact = site.place.checkpoint()
    copy = Path(shutil.copytree(intact, site.folder / "input"))
    (copy / "nemo_megacpp.manifest.json").unlink()
    path = draw.choice(sorted(copy.rglob("*.distcp")))
    content = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    doors = [door for door in CHECKPOINT if "inspect" not in door.name]
    what = f"the manifest removed, bit {bit} of {path.relative_to(copy)} flipped"
    return site.meet(draw.choice(doors), copy, what, intact)


KINDS = (
    Kind("flip", "bits of any file of a checkpoint, an export or prepared data flipped", _flip),
    Kind("truncate", "such a file cut off, emptied, removed, zeroed or longer", _truncate),
    Kind("swap", "such files, or blocks of one, exchanged", _swap),
    Kind("no-manifest", "a checkpoint's manifest removed, its weights changed", _without_manifest),
)
