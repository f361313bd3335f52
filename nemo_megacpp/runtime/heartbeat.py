"""End a job in which a rank does not move, and say which one.

In every rank a thread publishes heartbeats in the job's ``TCPStore``, over a connection of its own:
how much the main thread has done, and where it stands. Two things end the job:

- a rank's heartbeats stop (a stopped process, a host that is gone). Its successor sees it.
- all ranks live and none makes progress: one sits in the data loader or in a family's code, and the
  others wait for it in a collective. Rank 0 sees it, as every heartbeat says how long its rank has
  stood still. While one rank is within its limit, as one that saves, the others may wait for it.

Whoever sees it asks all ranks where they stand, decides which one is the cause, and every rank ends
its own process, at once: a main thread in a collective raises no exception.

Time is what this thread has lived through: a job that is suspended and continued as a whole, by
Slurm or by hand, has lost nothing. It costs a rank two requests to the store for each heartbeat,
however many ranks there are.

The watchdog of torch's NCCL groups knows neither gloo nor a rank outside a collective, torch
elastic's timers and the monitors of nvidia-resiliency-ext need a launcher of their own, and none of
them says which rank the others wait for.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch

from nemo_megacpp.printable import say
from nemo_megacpp.runtime.places import describe_place, main_thread_module, main_thread_stack
from nemo_megacpp.runtime.rank_errors import write_stall
from nemo_megacpp.runtime.stall import Beat, Verdict, judge, kill, write_stacks

_logger = logging.getLogger(__name__)

_BEATS = 20
"""Heartbeats in the shorter limit, but at most one each 0.1 s and at least one each 5 s."""
_POLL = 0.02
_SETTINGS = ("heartbeat_timeout_minutes", "init_timeout_minutes")


class Limits(NamedTuple):
    """Seconds without progress, or without a heartbeat, that end a job.

    Attributes:
        usual: in a step.
        slow: from the start through the first step and the first batch of an evaluation, which
            compile, and while a checkpoint is saved.
    """

    usual: float
    slow: float


class _Progress:
    """What the main thread does, for the thread that watches it."""

    def __init__(self) -> None:
        self.count, self.steps = 0, 0
        self.phase, self.slow = "the start of the run", True


_progress = _Progress()
_watch: _Watch | None = None
_starts = itertools.count()


def progress(phase: str | None = None, slow: bool | None = None, steps: int | None = None) -> None:
    """Note that the main thread has made progress.

    Args:
        phase: what it does from now on, as in "step 7".
        slow: whether that may take :attr:`Limits.slow`.
        steps: that are complete.
    """
    _progress.phase = _progress.phase if phase is None else phase
    _progress.slow = _progress.slow if slow is None else slow
    _progress.steps = _progress.steps if steps is None else steps
    _progress.count += 1


@contextlib.contextmanager
def slow_phase(phase: str) -> Iterator[None]:
    """Be in a slow phase, and then again in the one before."""
    before = _progress.phase, _progress.slow
    progress(phase, slow=True)
    try:
        yield
    finally:
        progress(*before)


def start(limits: Limits, folder: Path, report: Callable[[str, int], object]) -> None:
    """Watch this rank and its job from now on; does nothing if it is watched already.

    The job is found as torch's ``env://`` finds it. All ranks call this equally often.

    Args:
        limits: of this run.
        folder: for the stacks of a stalled job; all ranks share it.
        report: called on one rank before the job ends, with the message and the complete steps.
    """
    global _watch
    if _watch is not None:
        return
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if world > 1 and not int(os.environ.get("MASTER_PORT", 0)):
        _logger.warning("No heartbeats: MASTER_PORT does not say where the job's store is.")
        return
    _watch = _Watch(rank, world, limits, folder, report)
    _watch.begin()


def stop() -> None:
    """Leave the run in order; the others go on."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


atexit.register(stop)  # a thread must not return from C++ into an interpreter that is gone


class _Still:
    """Seconds for which a value has been the same."""

    def __init__(self) -> None:
        self.value: object = None
        self.seconds = 0.0

    def after(self, elapsed: float, value: object) -> float:
        self.seconds = self.seconds + elapsed if value == self.value else 0.0
        self.value = value
        return self.seconds


class _Clock:
    """Time in which this process ran: a pause longer than twice the interval counts as that."""

    def __init__(self, interval: float):
        self._longest, self._last = 2 * interval, time.monotonic()

    def elapsed(self) -> float:
        now, last = time.monotonic(), self._last
        self._last = now
        return min(now - last, self._longest)


class _Watch:
    def __init__(
        self,
        rank: int,
        world: int,
        limits: Limits,
        folder: Path,
        report: Callable[[str, int], object],
    ):
        self._rank, self._world, self._limits = rank, world, limits
        self._folder, self._report = folder, report
        self._interval = min(max(min(limits) / _BEATS, 0.1), 5.0)
        self._stopping = threading.Event()
        self._beat = Beat()
        self._before: Beat | None = None
        self._ticks = 0
        self._own, self._other = _Still(), _Still()
        self._attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{next(_starts)}"
        self._threads = [threading.Thread(target=self._run, name="heartbeat", daemon=True)]
        if world > 1 and not _store_of_parent():
            self._threads.append(threading.Thread(target=self._guard, name="store", daemon=True))

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=2)  # more only where the store does not answer

    @property
    def _limit(self) -> float:
        return self._limits.slow if _progress.slow else self._limits.usual

    @property
    def _settings(self) -> str:
        pairs = zip(_SETTINGS, self._limits, strict=True)
        return ", ".join(f"{name}={seconds / 60:g}" for name, seconds in pairs)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._watch()
            except torch.distributed.DistError as error:  # a lost connection, or the end of the job
                _logger.debug("The job's store does not answer: %s", error)

    def _watch(self) -> None:
        if self._world > 1:
            self._store = self._connect()
        clock = _Clock(self._interval)
        while not self._stopping.wait(self._interval):
            self._tick(clock.elapsed())
            self._ticks += 1
        self._publish(ended=True)

    def _connect(self) -> torch.distributed.Store:
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(self._limits)),
        )
        return torch.distributed.PrefixStore(f"nemo_megacpp/heartbeat/{self._attempt}", store)

    def _publish(self, asked: bool = False, ended: bool = False) -> None:
        beat = self._beat
        beat.number += 1
        beat.progress, beat.phase, beat.limit = _progress.count, _progress.phase, self._limit
        beat.stack, beat.asked, beat.ended = main_thread_stack(), asked, ended
        beat.module = main_thread_module() if asked else ""
        if self._world > 1:
            self._store.set(str(self._rank), beat.to_json())

    def _tick(self, elapsed: float) -> None:
        self._beat.still = self._own.after(elapsed, _progress.count)
        self._publish()
        if self._world == 1:
            if self._beat.is_stalled:
                self._publish(asked=True)
                self._decide({0: self._beat}, [])
            return
        if self._store.check(["asked"]):
            self._answer()
        before = (self._rank - 1) % self._world
        beat = self._read(before)
        self._before = beat or self._before
        silent = self._other.after(elapsed, beat and beat.number)
        ended = beat is not None and beat.ended
        if not ended and silent >= (beat.limit if beat else self._limits.slow):
            self._ask([before])
        elif self._rank == 0 and self._beat.is_stalled:
            beats = self._read_all().values()
            if all(beat is not None and beat.is_stalled for beat in beats):
                self._ask([])

    def _read(self, rank: int) -> Beat | None:
        key = str(rank)
        return Beat.from_json(self._store.get(key)) if self._store.check([key]) else None

    def _read_all(self) -> dict[int, Beat | None]:
        return {rank: self._read(rank) for rank in range(self._world)}

    def _ask(self, silent: list[int]) -> None:
        """Ask all ranks where they stand, and decide."""
        if self._store.compare_set("asked", "", str(self._rank)) != str(self._rank).encode():
            return  # another rank asks: the next tick answers
        self._publish(asked=True)
        self._collect(silent)

    def _answer(self) -> None:
        """Say where this rank stands, and end it as the rank that asked decides."""
        self._publish(asked=True)
        patience = 3 * self._grace
        if not self._wait(lambda: self._store.check(["verdict"]), patience):
            self._collect([])  # the rank that asked is dead as well
        self._end(Verdict(**json.loads(self._store.get("verdict"))))

    @property
    def _grace(self) -> float:
        """Seconds for all ranks to answer."""
        return max(2 * self._interval, min(self._limits.usual / 2, 30.0))

    def _collect(self, silent: list[int]) -> None:
        expected = set(range(self._world)) - set(silent)

        def unanswered() -> list[int]:
            missing = []
            for rank in sorted(expected):
                beat = self._read(rank)
                if beat is None or not (beat.asked or beat.ended):
                    missing.append(rank)
            expected.intersection_update(missing)
            return missing

        self._wait(lambda: not unanswered(), self._grace)
        self._decide(self._read_all(), sorted({*silent, *expected}))

    def _decide(self, beats: dict[int, Beat | None], dead: list[int]) -> None:
        stacks = self._folder / f"stacks-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        silent = self._other.seconds
        message, seconds = judge(beats, dead, silent, self._settings, stacks)
        alive = sum(1 for r, beat in beats.items() if beat and not beat.ended and r not in dead)
        verdict = Verdict(message, dead, alive, seconds, self._rank)
        if self._world > 1:
            text = json.dumps(asdict(verdict))
            verdict = Verdict(**json.loads(self._store.compare_set("verdict", "", text)))
        if verdict.author == self._rank:
            write_stacks(beats, stacks)
        self._end(verdict)

    def _wait(self, reached: Callable[[], bool], seconds: float) -> bool:
        clock = _Clock(self._interval)
        while not reached():
            seconds -= clock.elapsed()
            if seconds < 0:
                return False
            time.sleep(_POLL)
        return True

    def _end(self, verdict: Verdict) -> None:
        """End this process after all ranks know why; of what follows nothing is printed."""
        try:
            launched = write_stall(verdict.message, time.time() - verdict.seconds)
            if verdict.author == self._rank:
                self._report(verdict.message, _progress.steps)
                if not launched:
                    say(verdict.message, error=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if self._world > 1:
                self._store.add("ready", 1)
                self._wait(lambda: self._store.add("ready", 0) >= verdict.alive, self._grace)
                kill({rank: self._read(rank) for rank in verdict.dead}, verdict.dead)
        finally:
            os._exit(1)

    def _guard(self) -> None:
        """End this rank if the store, in the process of rank 0 or on another host, is silent."""
        clock, ticks = _Clock(self._interval), _Still()
        while not self._stopping.wait(self._interval):
            if not self._threads[0].is_alive():
                return
            seconds = ticks.after(clock.elapsed(), self._ticks)
            if seconds > self._limit + self._grace:
                self._end_alone(seconds)

    def _end_alone(self, seconds: float) -> None:
        """End this rank because the job's store does not answer; the others do the same."""
        place = describe_place(main_thread_stack())
        message = (
            f"The job's store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} has not "
            f"answered for {seconds:.0f} s: the process that holds it (rank 0, or torchrun on the "
            f"first node) is stopped or not reachable. Rank {self._rank} is in {_progress.phase}, "
            f"at {place}. The job was ended ({self._settings})."
        )
        try:
            launched = write_stall(message, time.time() - seconds)
            if self._rank == 1:
                if not launched:
                    say(message, error=True)
                kill({0: self._before}, [0])
        finally:
            os._exit(1)


def _store_of_parent() -> bool:
    """Return whether the store is in the launcher of this node, which may be suspended."""
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return of_agent and os.environ.get("GROUP_RANK", "0") == "0"
