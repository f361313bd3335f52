"""``kill -9`` across saves, and what must hold after each."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from nemo_megacpp.checkpoint import manifest
from nemo_megacpp.checkpoint.folder import complete_checkpoints, newest_checkpoint
from nemo_megacpp.checkpoint.identity import FILE as IDENTITY
from nemo_megacpp.errors import UserError
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool
from tests.faults.judge import Outcome
from tests.faults.kinds import Kind, Site
from tests.faults.saving import (
    KEEP_LAST,
    RANKS,
    Kill,
    checkpoint_of,
    load_then_save,
    save_and_be_killed,
    save_whole,
)

_LINGER = 30.0
"""Seconds that a killed rank's helpers get to end; on a busy machine they may have to wait."""

PHASES = (
    "before the folder",
    "weights being written",
    "weights whole, no identity",
    "manifest being written",
    "whole, older ones being removed",
    "whole, older ones removed",
    "saved before the kill",
)


@dataclass
class Strike:
    """One kill across a save.

    Attributes:
        kill: who was killed, and when.
        phase: of :data:`PHASES`: how far the save had come.
        wrong: what did not hold.
    """

    kill: Kill
    phase: str
    wrong: list[str]

    @property
    def landed(self) -> bool:
        """Whether it met a save under way."""
        return self.phase != PHASES[-1]


class KilledSaves:
    """Kills ranks across saves into one folder.

    After each: no process is left; the newest whole checkpoint is the last that was finished,
    passes its manifest in full and loads bit for bit; every older one that should be there is
    there, unchanged; and the next save into the same folder succeeds.

    Args:
        pool: of :data:`tests.faults.saving.RANKS` ranks or more.
        folder: empty; of the checkpoints.
    """

    def __init__(self, pool: WorkerPool, folder: Path):
        self._pool, self._folder, self._step = pool, folder, 0
        for _ in range(KEEP_LAST):
            timing = pool.run(RANKS, save_whole, str(folder), self._next())
        self._seconds = max(duration for duration, _ in timing)
        self._events = [count for _, count in timing]

    def _next(self) -> int:
        self._step += 1
        return self._step

    def strike(self, points: random.Random) -> Strike:
        """Save, kill in between, check, load the newest, save again."""
        pool, folder, step = self._pool, self._folder, self._next()
        kill = _draw(points, self._seconds, self._events)
        before = {path: _fingerprint(path) for _, path in complete_checkpoints(folder)}
        survived, helpers = False, _helpers(pool)
        with contextlib.suppress(WorkerError):
            pool.run(RANKS, save_and_be_killed, str(folder), step, kill)
            survived = True
        wrong = []
        if left := _left_behind(pool, helpers):
            wrong.append(f"processes left behind: {left}")
        phase = PHASES[-1] if survived else _phase(checkpoint_of(folder, step), before)
        wrong += _faults(folder, step, before)
        newest = newest_checkpoint(folder)
        if newest is None:
            return Strike(kill, phase, [*wrong, "nothing is left"])
        loaded = int(newest.name.removeprefix("step="))
        following = self._next()
        different = pool.run(RANKS, load_then_save, str(folder), loaded, following)
        if any(different):
            wrong.append(f"{newest} loads other bits in {different}")
        found = [path for _, path in complete_checkpoints(folder)]
        if sorted(os.listdir(folder)) != sorted(path.name for path in found):
            wrong.append(f"not cleared away: {sorted(os.listdir(folder))}")
        if found != [newest, checkpoint_of(folder, following)]:
            wrong.append(f"after the next save there are {found}")
        return Strike(kill, phase, wrong)


def _attempt(draw: random.Random, site: Site) -> Outcome:
    strike = KilledSaves(site.place.pool, site.folder).strike(draw)
    what = f"kill -9 across a save: {strike.kill}"
    moment = f"kill -9 of {strike.kill.victims}: {strike.phase}"
    return Outcome(what, "survived", strike.wrong, moment=moment)


KINDS = (Kind("kill-save", "kill -9 of one rank or all of them across a save", _attempt),)


def _draw(points: random.Random, seconds: float, events: list[int]) -> Kill:
    """Draw a kill: half by the clock, half between two file operations of a rank."""
    victims, rank = points.choice(("one", "all")), points.randrange(RANKS)
    by_clock, moment = points.random() < 0.5, points.random()
    if by_clock or not events[rank]:
        return Kill(victims, rank, seconds=seconds * moment)
    return Kill(victims, rank, event=1 + int(events[rank] * moment))


def _phase(directory: Path, before: dict[Path, str]) -> str:
    if (directory / manifest.FILE).exists():
        kept = [path for path in before if path.exists()]
        cleared = len(kept) < KEEP_LAST and not list(directory.parent.glob("*.deleting"))
        return PHASES[5] if cleared else PHASES[4]
    if (directory / IDENTITY).exists():
        return PHASES[3]
    if (directory / "weights" / "metadata.json").exists():
        return PHASES[2]
    return PHASES[1] if directory.exists() else PHASES[0]


def _faults(folder: Path, step: int, before: dict[Path, str]) -> list[str]:
    """Return what does not hold after a kill during the save of ``step``."""
    wrong = []
    new, newest = checkpoint_of(folder, step), newest_checkpoint(folder)
    finished = (new / manifest.FILE).exists()
    if newest != (new if finished else max(before, key=_step_of)):
        wrong.append(f"the newest is {newest}")
    kept = sorted(before, key=_step_of)
    if finished:
        kept = kept[1:]  # the oldest may go now
    for path in kept:
        if not path.exists() or _fingerprint(path) != before[path]:
            wrong.append(f"{path} was damaged")
    for _, path in complete_checkpoints(folder):
        try:
            if "contents verified" not in manifest.check_manifest(path):
                wrong.append(f"{path} counts without a manifest")
        except UserError as error:
            wrong.append(f"{path} counts and is damaged: {error}")
    return wrong


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step="))


def _fingerprint(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        digest.update(str(path.relative_to(directory)).encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _helpers(pool: WorkerPool) -> set[int]:
    """Return what the idle pool keeps running for all its tasks."""
    server = psutil.Process(pool._server.process.pid)
    return {child.pid for child in server.children(recursive=True)}


def _left_behind(pool: WorkerPool, helpers: set[int]) -> list[str]:
    """Return what still runs of a task that is over; it is ended then."""
    owners = {pool._server.process.pid}
    give_up = time.monotonic() + _LINGER
    while True:
        left = [
            process
            for process in psutil.process_iter()
            if process.pid not in helpers and _belongs(process.pid, owners)
        ]
        if not left:
            return []
        if time.monotonic() > give_up:
            break
        time.sleep(0.02)
    told = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            told.append(f"{process.pid} {' '.join(process.cmdline())}")
            process.kill()
    return told


def _belongs(process: int, owners: set[int]) -> bool:
    """Say whether ``process`` was started by a task of one of ``owners``."""
    try:
        return process not in owners and os.getpgid(process) in owners
    except ProcessLookupError:
        return False
