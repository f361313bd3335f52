"""Which rank a stalled job waits for, and how to say it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from nemo_megacpp.runtime.places import Place, describe_place, format_stack, waits

_SHOWN = 4
"""Groups of ranks at one place that the message names; the file holds all."""
_STATES = {
    psutil.STATUS_STOPPED: "it is stopped by a signal (SIGSTOP or SIGTSTP)",
    psutil.STATUS_TRACING_STOP: "a debugger has stopped it",
    psutil.STATUS_DISK_SLEEP: "it is in an uninterruptible call of the kernel (state D)",
    psutil.STATUS_ZOMBIE: "it has ended",
}


@functools.cache
def _host() -> str:
    """Return what tells apart machines, and on one machine its containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [boot.read_text().strip(), str(space.stat().st_ino)]
    return " ".join(parts)


@dataclass
class Beat:
    """What a rank publishes of itself.

    Attributes:
        number: counts its heartbeats.
        progress: counts what its main thread has done.
        phase: what that does: "step 7".
        limit: seconds that the phase may take without progress or heartbeat.
        still: seconds without progress.
        stack: of its main thread.
        module: that it is in; known only when ``asked``.
        asked: it answers the question where everyone stands.
        ended: it has left the run in order.
    """

    number: int = 0
    progress: int = 0
    phase: str = ""
    limit: float = 0.0
    still: float = 0.0
    stack: Sequence[Place] = ()
    module: str = ""
    asked: bool = False
    ended: bool = False
    host: str = field(default_factory=_host)
    pid: int = field(default_factory=os.getpid)
    created: float = field(default_factory=lambda: psutil.Process().create_time())

    def to_json(self) -> str:
        """Return the beat as the store holds it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Beat:
        """Return the beat that ``to_json`` wrote."""
        beat = cls(**json.loads(text))
        beat.stack = [Place(*place) for place in beat.stack]
        return beat

    @property
    def is_stalled(self) -> bool:
        """Whether it can move no other rank: it has stood still too long, or ended."""
        return self.ended or self.still >= self.limit

    def process(self) -> psutil.Process | None:
        """Return the rank's process, if it runs on this machine."""
        if self.host != _host():
            return None
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created) < 1:
                return process
        return None


@dataclass
class Verdict:
    """How a stalled job ends.

    Attributes:
        message: for the user.
        dead: ranks that do not respond.
        alive: number of ranks that will end themselves.
        seconds: since when nothing moves.
        author: the rank that decided.
    """

    message: str
    dead: list[int]
    alive: int
    seconds: float
    author: int


def judge(
    beats: Mapping[int, Beat | None],
    dead: Sequence[int],
    silent: float,
    settings: str,
    stacks: Path,
) -> tuple[str, float]:
    """Return the message of a stalled job, and the seconds for which nothing has moved.

    The cause is a rank that does not respond; else one that waits for no other rank, of these the
    one with the least progress, the user's own code first; else one that has ended.

    Args:
        beats: the last of every rank; None for one that never began.
        dead: ranks that do not respond.
        silent: seconds without a heartbeat of theirs.
        settings: which limit was exceeded.
        stacks: where :func:`write_stacks` wrote, for the message.
    """
    living = {rank: beat for rank, beat in beats.items() if beat and rank not in dead}
    busy = {rank: beat for rank, beat in living.items() if not beat.ended and not waits(beat.stack)}
    seconds = silent if dead else min((b.still for b in living.values() if not b.ended), default=0)
    if dead:
        told = [_of_dead(rank, beats[rank], silent) for rank in dead[:_SHOWN]]
        if len(dead) > _SHOWN:
            told.append(f"{len(dead) - _SHOWN} other ranks have not responded either.")
        cause = list(dead)
    elif busy:
        least = min(beat.progress for beat in busy.values())
        cause = [rank for rank, beat in busy.items() if beat.progress == least]
        told = [f"{_ranks(cause)} made no progress for {seconds:.0f} s."]
        told += _places({rank: busy[rank] for rank in cause})
    elif ended := [rank for rank, beat in living.items() if beat.ended]:
        cause = ended
        told = [f"{_ranks(ended)} left the run; the others wait."]
    else:
        cause = []
        told = [f"No rank made progress for {seconds:.0f} s: all wait for one another."]
    rest = {rank: beat for rank, beat in living.items() if rank not in cause and not beat.ended}
    told += _places(rest)
    told.append(f"The job was ended ({settings}).")
    return "\n".join([" ".join(told), f"Stacks of all ranks: {stacks}"]), seconds


def _of_dead(rank: int, beat: Beat | None, silent: float) -> str:
    if beat is None:
        return f"Rank {rank} has not responded since the start, {silent:.0f} s ago."
    silent = max(silent, beat.still)
    process, state = beat.process(), None
    if process is not None:
        with contextlib.suppress(psutil.Error):
            state = _STATES.get(process.status())
    elif beat.host == _host():
        state = "it has ended"
    why = f": {state}" if state else ""
    return (
        f"Rank {rank} (process {beat.pid} on {beat.host.split()[0]}) has not responded for "
        f"{silent:.0f} s{why}. It was last seen in {beat.phase}, at {describe_place(beat.stack)}."
    )


def _places(beats: Mapping[int, Beat]) -> list[str]:
    """Return a sentence for the ranks that stand at one place, least progress first."""
    groups: dict[tuple[bool, str, str], list[int]] = defaultdict(list)
    for rank in sorted(beats, key=lambda rank: (beats[rank].progress, rank)):
        beat = beats[rank]
        place = describe_place(beat.stack, beat.module)
        groups[waits(beat.stack), beat.phase, place].append(rank)
    told = []
    for (waiting, phase, place), ranks in [*groups.items()][:_SHOWN]:
        verb = ("waits" if waiting else "is") if len(ranks) == 1 else "wait" if waiting else "are"
        told.append(f"{_ranks(ranks)} {verb} in {phase}, at {place}.")
    return told


def _ranks(ranks: Sequence[int]) -> str:
    """Return "Rank 3", or "Ranks 0, 2, 3 and 5 others"."""
    if len(ranks) == 1:
        return f"Rank {ranks[0]}"
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"Ranks {shown}{f' and {len(ranks) - 8} others' if len(ranks) > 8 else ''}"


def write_stacks(beats: Mapping[int, Beat | None], path: Path) -> None:
    """Write what is known of every rank; a disk that is full is left as it is."""
    parts = []
    for rank, beat in beats.items():
        if beat is None:
            parts.append(f"rank {rank}: never responded\n")
            continue
        known = "stack" if beat.asked else "last known stack"
        parts.append(
            f"rank {rank}: process {beat.pid} on {beat.host.split()[0]}, {beat.phase}, "
            f"{'ended' if beat.ended else f'no progress for {beat.still:.0f} s'}; {known}:\n"
            f"{format_stack(beat.stack)}\n"
        )
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(parts), encoding="utf-8")


def kill(beats: Mapping[int, Beat | None], ranks: Sequence[int]) -> None:
    """Kill those of the ranks that run on this machine; a stopped process takes no other signal."""
    for rank in ranks:
        beat = beats.get(rank)
        process = beat.process() if beat else None
        if process is not None and process.pid != os.getpid():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
