"""A pool of worker processes that run one distributed task after another.

Starting a process and importing Megatron costs seconds; a parity run wants dozens of layouts. The
pool starts its ranks once, and a rank forks for every task, or for a batch of them: the child joins
a process group, runs the tasks and ends. Nothing outlives it, neither Megatron's global state nor
the sockets and threads of its process groups, which references in autograd graphs would otherwise
keep alive.
"""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import multiprocessing as mp

from nemo_megacpp.errors import RankFailed, UserError

if TYPE_CHECKING:
    from nemo_megacpp.runtime.clean_state import CleanState

Device = Literal["cuda", "cpu"]
Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A task, which must be importable by name, and its arguments."""

_GRACE = 10.0
"""Seconds that the other ranks get to end by themselves once one has failed."""
_POLL = 0.005
"""Seconds between two looks at a running task."""


class WorkerError(RankFailed):
    """A task raised on a worker; carries the first failing rank's traceback."""


class _Worker(NamedTuple):
    pipe: Any
    process: Any


class WorkerPool:
    """``size`` processes, ranks 0 to ``size - 1``.

    Args:
        size: most ranks that a task can ask for.
        threads: torch threads per worker.
        device: ``cuda`` gives rank ``r`` the ``r``-th GPU and NCCL, ``cpu`` hides the GPUs from
            all ranks (gloo).

    Raises:
        UserError: ``cuda`` with fewer GPUs than ranks.

    Use as a context manager, or call :meth:`close`.
    """

    def __init__(self, size: int, threads: int = 1, device: Device = "cpu"):
        if device == "cuda" and torch.cuda.device_count() < size:
            raise UserError(
                f"{size} ranks need as many GPUs; this machine has {torch.cuda.device_count()}."
            )
        self._threads, self.device = threads, device
        self._rendezvous = tempfile.TemporaryDirectory(prefix="nemo-megacpp-ranks-")
        self._batches = 0
        self._workers = [self._start(rank) for rank in range(size)]

    def _start(self, rank: int) -> _Worker:
        context = mp.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, rank, self._threads, self.device))
        process.start()
        there.close()
        return _Worker(here, process)

    @property
    def size(self) -> int:
        """Most ranks that a task can ask for."""
        return len(self._workers)

    def run(self, world_size: int, task: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``task(*args)`` on ranks 0 … ``world_size - 1`` inside a default process group.

        ``task`` must be importable by name; arguments and results travel by pickle.

        Returns:
            What each rank returned, by rank.

        Raises:
            WorkerError: if the task raised on any rank.
        """
        (outcome,) = self.run_many(world_size, [(task, args)])
        if isinstance(outcome, WorkerError):
            raise outcome
        return outcome

    def run_many(self, world_size: int, jobs: Sequence[Job]) -> list[list[Any] | WorkerError]:
        """Run one task after another in the same processes, inside one default process group.

        Cheaper than :meth:`run` for each: the ranks fork and meet once, and the groups of a layout
        are created once (:class:`nemo_megacpp.runtime.clean_state.CleanState`). A job finds
        Megatron's and NeMo's state and the random generators as if it were the first; what it
        changes in other modules it must undo itself. After a job that failed, the rest run in new
        processes.

        Args:
            world_size: ranks of every job.
            jobs: tasks with their arguments, as :meth:`run` takes them.

        Returns:
            For each job what each rank returned, by rank, or the error that :meth:`run` would
            raise.
        """
        outcomes: list[list[Any] | WorkerError] = []
        while len(outcomes) < len(jobs):
            outcomes += self._run_until_failure(world_size, jobs[len(outcomes) :])
        return outcomes

    def _run_until_failure(
        self, world_size: int, jobs: Sequence[Job]
    ) -> Iterator[list[Any] | WorkerError]:
        assert 0 < world_size <= self.size, (world_size, self.size)
        self._batches += 1
        store = Path(self._rendezvous.name) / f"batch{self._batches}"
        for worker in self._workers[:world_size]:
            worker.pipe.send((world_size, f"file://{store}", list(jobs)))
        for left in reversed(range(len(jobs))):
            results, failures = self._collect(world_size)
            if left:  # the ranks that did not fail wait to be told
                for rank in results:
                    self._workers[rank].pipe.send(not failures)
            if failures:
                yield WorkerError("\n".join(failures))
                return
            yield [results[rank] for rank in range(world_size)]

    def _collect(self, world_size: int) -> tuple[dict[int, Any], list[str]]:
        """Wait for a job on all ranks: the results of those that succeeded, and the failures."""
        results: dict[int, Any] = {}
        failures: list[str] = []
        waiting = set(range(world_size))
        while waiting:
            pipes = [self._workers[rank].pipe for rank in sorted(waiting)]
            ready = wait(pipes, timeout=_GRACE if failures else None)
            if not ready:
                # A rank failed and the others wait for it in a collective: replace them.
                for rank in waiting:
                    self._replace(rank)
                break
            for rank in [rank for rank in waiting if self._workers[rank].pipe in ready]:
                waiting.remove(rank)
                ok, result = self._receive(rank)
                if ok:
                    results[rank] = result
                else:
                    failures.append(f"rank {rank}: {result}")
        return results, failures

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return self._workers[rank].pipe.recv()
        except EOFError:
            self._replace(rank)
            return False, "the process died"

    def _replace(self, rank: int) -> None:
        worker = self._workers[rank]
        worker.pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.join()
        self._workers[rank] = self._start(rank)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(timeout=20)
            if worker.process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it may not lead a group yet
                    os.killpg(worker.process.pid, signal.SIGKILL)
                worker.process.kill()
        self._rendezvous.cleanup()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def device_for(ranks: int) -> Device:
    """Return ``cuda`` if this machine has a GPU for each of ``ranks``, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "cpu"


def _work(pipe: Any, rank: int, threads: int, device: Device) -> None:
    """Wait for tasks; a task is run by a fork of this process, which itself starts no threads."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Asking for GPUs through the CUDA runtime would spoil CUDA for the forks; NVML does not.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.setpgrp()  # so that a hanging task can be ended together with what it has started
    owner = os.getppid()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # the libraries' remarks, once per task and rank
    while True:
        try:
            message = pipe.recv()  # imports what the tasks need
        except EOFError:
            return
        if isinstance(message, bool):
            continue  # meant for a fork that died in between
        world_size, rendezvous, jobs = message
        child = os.fork()
        if child == 0:
            # What the task leaves there goes with the pool: a fork runs no clean-up of Python's.
            tempfile.tempdir = os.path.dirname(rendezvous.removeprefix("file://"))
            _run_jobs(pipe, rank, world_size, rendezvous, jobs)
            for started in mp.active_children():  # Megatron's saving leaves a manager behind
                started.terminate()
            os._exit(0)
        status = _wait_for(child, owner)
        if status != 0:
            code = os.waitstatus_to_exitcode(status)
            pipe.send((False, f"the process died (exit code {code})"))


def _wait_for(child: int, owner: int) -> int:
    """Return the exit status of ``child``; if the pool's owner is gone, end everything here."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if os.getppid() != owner:
            os.killpg(0, signal.SIGKILL)
        time.sleep(_POLL)


def _run_jobs(pipe: Any, rank: int, world_size: int, rendezvous: str, jobs: Sequence[Job]) -> None:
    """Run the jobs and send each one's result; stop after one that fails here or elsewhere."""
    from nemo_megacpp.runtime.distributed import start_process_group

    clean = None
    for left, (task, args) in zip(reversed(range(len(jobs))), jobs, strict=True):
        try:
            if clean is not None:
                clean.restore()
            else:
                start_process_group(rank, world_size, rendezvous)
                clean = _clean_state() if left else None
            # Pickle has made one object of what several jobs were given.
            answer = True, task(*copy.deepcopy(args))
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
        if not (answer[0] and left and pipe.recv()):
            return


def _clean_state() -> CleanState:
    from nemo_megacpp.runtime.clean_state import CleanState

    return CleanState()
