"""Bytes that a disk or a network has changed: flipped, cut off, exchanged, gone."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import numpy as np

from tests.faults import results
from tests.faults.doors import CHECKPOINT, DATA, EXPORT, Door
from tests.faults.judge import Outcome, judge
from tests.faults.kinds import Kind, Site
from tests.faults.workplace import RECIPE, SETTINGS, reseal

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


def _vocabulary(draw: random.Random, site: Site) -> Outcome:
    """Token ids beyond the vocabulary, which Megatron embeds as zeros at TP > 1."""
    data = site.place.data
    copy = Path(shutil.copytree(data.root, site.folder / "input"))
    path = copy / draw.choice(("train.bin", "heldout.bin"))
    ids = np.fromfile(path, np.uint16)
    for position in draw.sample(range(len(ids)), draw.choice((1, 10, len(ids) // 2))):
        ids[position] = draw.randint(data.vocab_size, 65535)
    ids.tofile(path)
    sealed = reseal(copy) if draw.random() < 0.7 else "the old checksums"
    what = f"ids of {path.name} beyond the vocabulary, {sealed}"
    return site.meet(draw.choice(DATA), copy, what, None, refuse=True)


def _newest(draw: random.Random, site: Site) -> Outcome:
    """The newest checkpoint of a run is damaged, and the run is resumed."""
    place = site.place
    run = Path(shutil.copytree(place.run, site.folder / "run"))
    newest = run / "checkpoints" / place.checkpoint().name
    path, how = draw.choice(_files(newest)), draw.choice(("flip", "cut", "gone"))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content if how == "flip" else content[: draw.randrange(len(content))])
    what = f"{how}: {path.relative_to(newest)} of the newest checkpoint"
    given = (f"data={place.data.root}", f"run_dir={run}", "resume=auto")
    ended = place.forks.run(["train", RECIPE, *SETTINGS, *given, "--dry-run"], cwd=site.folder)
    outcome = judge(ended, place, f"{what}; train resume=auto --dry-run")
    if ended.code != 0:
        return outcome
    found = re.search(r"resuming (\S+step=(\d+)) ", ended.out)
    if found is None:
        outcome.wrong.append("it does not say what it resumes")
        return outcome
    intact = place.checkpoint(int(found[2]))
    loaded = place.forks.run(
        None, cwd=site.folder, then=results.of_checkpoint, given=(found[1],)
    ).result
    if (
        loaded
        != place.forks.run(
            None, cwd=site.folder, then=results.of_checkpoint, given=(str(intact),)
        ).result
    ):
        outcome.wrong.append(f"it resumes {found[1]}, which is damaged")
    if intact != place.checkpoint() and newest.name not in ended.out + ended.err:
        outcome.wrong.append("it does not name the checkpoint that it skips")
    return outcome


KINDS = (
    Kind("flip", "bits of any file of a checkpoint, an export or prepared data flipped", _flip),
    Kind("truncate", "such a file cut off, emptied, removed, zeroed or longer", _truncate),
    Kind("swap", "such files, or blocks of one, exchanged", _swap),
    Kind("no-manifest", "a checkpoint's manifest removed, its weights changed", _without_manifest),
    Kind("vocabulary", "token ids beyond the vocabulary, with checksums that match", _vocabulary),
    Kind("newest", "the newest checkpoint of a run damaged before resume=auto", _newest),
)
