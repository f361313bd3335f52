"""A corpus cut into shards: what one process reads at a time, and a restart does not repeat."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nemo_megacpp.data.corpus import COMPRESSED, SourceFile
from nemo_megacpp.data.text_encoding import wide_encoding

SHARD_BYTES = 32 << 20
"""Size of a shard, where files or lines allow it."""

_CHUNK = 1 << 20
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Shard:
    """Consecutive files, or spans of one. ``number`` is its position in the corpus."""

    number: int
    files: tuple[SourceFile, ...]

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(file.size for file in self.files)


def cut(files: Iterable[SourceFile], encoding: str | None = None) -> list[Shard]:
    """Cut a corpus into shards, in its order.

    Small files share a shard. A plain ``.jsonl`` file that is larger than one is cut between lines;
    a compressed one cannot be, nor one in UTF-16 or UTF-32.
    """
    groups: list[list[SourceFile]] = []
    size = 0
    for span in (span for file in files for span in _spans(file, encoding)):
        if not groups or size + span.size > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(span)
        size += span.size
    return [Shard(number, tuple(group)) for number, group in enumerate(groups)]


def _spans(file: SourceFile, encoding: str | None) -> Iterator[SourceFile]:
    if file.size <= SHARD_BYTES or not file.is_jsonl or file.path.name.lower().endswith(COMPRESSED):
        yield file
        return
    start, line = 0, 1
    try:
        with file.path.open("rb") as stream:
            if wide_encoding(stream.read(4), encoding) is not None:
                yield file
                return
            while start < file.size:
                stream.seek(start)
                lines, length = 0, 0
                while length < SHARD_BYTES and (chunk := stream.read(_CHUNK)):
                    lines, length = lines + chunk.count(b"\n"), length + len(chunk)
                if length == 0:  # the file has shrunk
                    break
                rest = stream.readline()
                stop = min(start + length + len(rest), file.size)
                lines += rest.endswith(b"\n")
                yield dataclasses.replace(
                    file, start=start, stop=stop, size=stop - start, first_line=line
                )
                start, line = stop, line + lines
    except OSError:  # reading the span reports it
        yield dataclasses.replace(file, start=start, size=file.size - start, first_line=line)


Run = Callable[[Callable[..., Any], Iterable[Any]], Iterator[Any]]
"""``run(function, items)`` yields ``function(item)`` in the order of the items."""


@contextmanager
def workers(count: int) -> Iterator[Run]:
    """Give a function that runs tasks in ``count`` processes, or in this one if ``count`` is 1."""
    if count == 1:
        yield map
        return
    # Tokenizers have threads, which a fork would leave behind.
    with multiprocessing.get_context("spawn").Pool(count, _start, (os.getpid(),)) as pool:
        yield pool.imap


def usual_workers(shards: list[Shard]) -> int:
    """Return the default number of processes: one for up to two shards, else one per core."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, len(shards)) if len(shards) > 2 else 1


def _start(parent: int) -> None:
    """Set up a worker: it ignores Ctrl-C, which its parent handles, and ends with its parent."""
    import ctypes
    import signal

    # Each worker is one of many already, so the tokenizers library needs no threads in it. It has
    # no other switch for them, and its results do not depend on it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)
