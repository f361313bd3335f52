"""A corpus cut into shards: what one worker reads at a time, and what a restart need not repeat."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nemo_megacpp.data.corpus import COMPRESSED, SourceFile
from nemo_megacpp.errors import UserError

SHARD_BYTES = 32 << 20
"""Size of a shard, where files or lines allow it."""

_CHUNK = 1 << 20
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Shard:
    """Consecutive files, or spans of one. ``number`` gives its place in the corpus."""

    number: int
    files: tuple[SourceFile, ...]

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(file.size for file in self.files)


def cut(files: Iterable[SourceFile]) -> list[Shard]:
    """Cut a corpus into shards, in its order.

    Small files share a shard. A plain ``.jsonl`` file that is larger than one is cut between lines;
    a compressed one cannot be.
    """
    shards: list[Shard] = []
    gathered: list[SourceFile] = []

    def close() -> None:
        if gathered:
            shards.append(Shard(len(shards), tuple(gathered)))
            gathered.clear()

    for file in files:
        for span in _spans(file):
            if gathered and sum(f.size for f in gathered) + span.size > SHARD_BYTES:
                close()
            gathered.append(span)
    close()
    return shards


def _spans(file: SourceFile) -> Iterator[SourceFile]:
    if file.size <= SHARD_BYTES or not file.is_jsonl or file.path.name.lower().endswith(COMPRESSED):
        yield file
        return
    try:
        with file.path.open("rb") as stream:
            start, line = 0, 1
            while start < file.size:
                stream.seek(start)
                lines, length = 0, 0
                while length < SHARD_BYTES and (chunk := stream.read(_CHUNK)):
                    lines, length = lines + chunk.count(b"\n"), length + len(chunk)
                if length == 0:  # the file has shrunk; reading it will say so
                    break
                rest = stream.readline()
                stop = min(start + length + len(rest), file.size)
                lines += rest.endswith(b"\n")
                yield dataclasses.replace(
                    file, start=start, stop=stop, size=stop - start, first_line=line
                )
                start, line = stop, line + lines
    except OSError as error:
        raise UserError(f"Cannot read {str(file.path)!r}: {error.strerror}.") from error


Run = Callable[[Callable[..., Any], Iterable[Any]], Iterator[Any]]
"""``run(function, items)`` yields ``function(item)`` in the order of the items."""


@contextmanager
def workers(count: int) -> Iterator[Run]:
    """Give a function that runs tasks in ``count`` processes, or here if that is one."""
    if count == 1:
        yield map
        return
    # Tokenizers have threads, which a fork would leave behind.
    with multiprocessing.get_context("spawn").Pool(count, _begin, (os.getpid(),)) as pool:
        yield pool.imap


def usual_workers(shards: list[Shard]) -> int:
    """Return how many workers pay: none besides this process for a few shards."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, len(shards)) if len(shards) > 2 else 1


def _begin(parent: int) -> None:
    """Begin a worker: it leaves Ctrl-C to its parent, and does not outlive it to write on."""
    import ctypes
    import signal

    # Threads of the tokenizers library, for which it has no other switch: each worker is one of
    # many already. What it returns does not depend on it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before it was watched
        os._exit(1)
