"""A pool of worker processes that run one distributed task after another.

Starting a process and importing Megatron costs seconds; a parity run wants dozens of layouts. The
pool starts its ranks once. Each task names how many of them it needs; those join a process group
of their own, run, and leave it.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing as mp


class WorkerError(RuntimeError):
    """A task raised on a worker; carries the first failing rank's traceback."""


class WorkerPool:
    """``size`` processes, ranks 0 to ``size - 1``.

    Args:
        size: most ranks that a task can ask for.
        threads: torch threads per worker.

    Use as a context manager, or call :meth:`close`.
    """

    def __init__(self, size: int, threads: int = 1):
        context = mp.get_context("spawn")
        self._pipes = []
        self._processes = []
        self._rendezvous = tempfile.TemporaryDirectory(prefix="nemo-megacpp-ranks-")
        self._tasks = 0
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, rank, threads))
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    @property
    def size(self) -> int:
        """Most ranks that a task can ask for."""
        return len(self._processes)

    def run(self, world_size: int, task: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``task(*args)`` on ranks 0 … ``world_size - 1`` inside a default process group.

        ``task`` must be importable by name; arguments and results travel by pickle.

        Returns:
            What each rank returned, by rank.

        Raises:
            WorkerError: if the task raised on any rank.
        """
        assert 0 < world_size <= self.size, (world_size, self.size)
        self._tasks += 1
        store = Path(self._rendezvous.name) / f"task{self._tasks}"
        for pipe in self._pipes[:world_size]:
            pipe.send((world_size, f"file://{store}", task, args))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes[:world_size]):
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "the process died"
            if not ok:
                failures.append(f"rank {rank}: {value}")
            results.append(value)
        if failures:
            raise WorkerError("\n".join(failures))
        return results

    def close(self) -> None:
        """End the workers."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
        self._rendezvous.cleanup()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _work(pipe: Any, rank: int, threads: int) -> None:
    torch.set_num_threads(threads)
    from nemo_megacpp.runtime.distributed import end_process_groups, start_process_group

    while True:
        try:
            world_size, rendezvous, task, args = pipe.recv()
        except EOFError:
            return
        try:
            start_process_group(rank, world_size, rendezvous)
            value = (True, task(*args))
        except BaseException:
            value = (False, traceback.format_exc())
        finally:
            end_process_groups()
        pipe.send(value)
