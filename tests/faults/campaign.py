"""A seeded series of kills across saves, with what must hold after each."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from nemo_megacpp.checkpoint import manifest
from nemo_megacpp.checkpoint.folder import complete_checkpoints, newest_checkpoint
from nemo_megacpp.checkpoint.identity import FILE as IDENTITY
from nemo_megacpp.errors import UserError
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool
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
class Tally:
    """What a campaign found.

    Attributes:
        landed: number of kills by victims and by how far the save had come.
        wrong: what did not hold.
    """

    landed: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Kills that met a save under way."""
        return sum(n for (_, phase), n in self.landed.items() if phase != PHASES[-1])

    def table(self) -> str:
        """Return the kills by phase and victims."""
        lines = [f"{'kill -9 when the save had come to':<36}{'one rank':>10}{'all ranks':>11}"]
        for phase in PHASES:
            one, everyone = self.landed["one", phase], self.landed["all", phase]
            lines.append(f"{phase:<36}{one:>10}{everyone:>11}")
        return "\n".join(lines)


def run_campaign(
    pool: WorkerPool, folder: Path, kills: int, seed: int, say: Callable[[str], object] = str
) -> Tally:
    """Kill ranks in mid-save until ``kills`` have met a save under way.

    After each: no process is left; the newest whole checkpoint is the last that was finished,
    passes its manifest in full and loads bit for bit; every older one that should be there is
    there, unchanged; and the next save into the same folder succeeds.
    """
    random_points, tally = random.Random(seed), Tally()
    for step in range(1, KEEP_LAST + 1):
        timing = pool.run(RANKS, save_whole, str(folder), step)
    seconds = max(duration for duration, _ in timing)
    events = [count for _, count in timing]
    while tally.kills < kills:
        step += 1
        kill = _draw(random_points, seconds, events)
        before = {path: _fingerprint(path) for _, path in complete_checkpoints(folder)}
        survived, helpers = False, _helpers(pool)
        with contextlib.suppress(WorkerError):
            pool.run(RANKS, save_and_be_killed, str(folder), step, kill)
            survived = True
        label = f"step {step}, {kill}"
        left = _left_behind(pool, helpers)
        if left:
            tally.wrong.append(f"{label}: processes left behind: {left}")
        phase = PHASES[-1] if survived else _phase(checkpoint_of(folder, step), before)
        tally.landed[kill.victims, phase] += 1
        say(f"{tally.kills}/{kills}  {label}: {phase}")
        tally.wrong += [f"{label}, {phase}: {what}" for what in _faults(folder, step, before)]
        newest = newest_checkpoint(folder)
        if newest is None:
            tally.wrong.append(f"{label}: nothing is left")
            return tally
        loaded = int(newest.name.removeprefix("step="))
        step += 1
        different = pool.run(RANKS, load_then_save, str(folder), loaded, step)
        if any(different):
            tally.wrong.append(f"{label}: {newest} loads other bits in {different}")
        found = [path for _, path in complete_checkpoints(folder)]
        if sorted(os.listdir(folder)) != sorted(path.name for path in found):
            tally.wrong.append(f"{label}: not cleared away: {sorted(os.listdir(folder))}")
        if found != [newest, checkpoint_of(folder, step)]:
            tally.wrong.append(f"{label}: after the next save there are {found}")
    return tally


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
    """Return what the idle workers keep running for all their tasks."""
    return {
        child.pid
        for worker in pool._workers
        for child in psutil.Process(worker.process.pid).children(recursive=True)
    }


def _left_behind(pool: WorkerPool, helpers: set[int]) -> list[str]:
    """Return what still runs of a task that is over; it is ended then."""
    owners = {worker.process.pid for worker in pool._workers}
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
