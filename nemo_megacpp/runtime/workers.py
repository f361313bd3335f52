"""A pool of worker processes that run one distributed task after another.

Starting a process and importing Megatron takes seconds; a parity run needs dozens of layouts. The
pool starts its ranks once, and a rank forks for every task: the child joins a process group, runs
the task and ends. So neither Megatron's global state nor the sockets and threads of its process
groups, to which autograd graphs may refer, outlive a task.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, Literal, NamedTuple

import torch
from torch import multiprocessing as mp

from nemo_megacpp.errors import RankFailed, UserError
from nemo_megacpp.runtime.imports import importing
from nemo_megacpp.runtime.orphans import call_bound
from nemo_megacpp.runtime.scratch import scratch_folder

Device = Literal["cuda", "cpu"]

_GRACE = 10.0
"""Seconds for the other ranks to end by themselves once one has failed."""
_POLL = 0.005
"""Seconds between two polls of a running task."""


class WorkerError(RankFailed):
    """A task raised on a worker; carries the first failing rank's traceback.

    Attributes:
        refusal: the message of the first UserError that a rank raised; the others lost a peer.
    """

    refusal: str | None = None


class _Failure(NamedTuple):
    """What a task raised: its traceback, and its message where that was a UserError."""

    text: str
    refusal: str | None = None


class _Worker(NamedTuple):
    pipe: Any
    process: Any


class WorkerPool:
    """``size`` processes, ranks 0 to ``size - 1``.

    Args:
        size: most ranks of a task.
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
        self._stack = contextlib.ExitStack()
        self._scratch = self._stack.enter_context(scratch_folder())
        self._tasks = 0
        self._workers = [self._start(rank) for rank in range(size)]

    def _start(self, rank: int) -> _Worker:
        context = mp.get_context("spawn")
        here, there = context.Pipe()
        # Linux ends a bound process with the thread that started it.
        main = threading.current_thread() is threading.main_thread()
        process = context.Process(
            target=call_bound,
            args=(
                *(os.getpid() if main else 0, __name__, "work"),
                *(there, rank, self._threads, self.device, str(self._scratch)),
            ),
        )
        process.start()
        there.close()
        return _Worker(here, process)

    @property
    def size(self) -> int:
        """Most ranks of a task."""
        return len(self._workers)

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
        store = self._scratch / f"task{self._tasks}"
        workers = self._workers[:world_size]
        for worker in workers:
            worker.pipe.send((world_size, f"file://{store}", task, args))
        results: dict[int, Any] = {}
        failures: dict[int, _Failure] = {}
        while len(results) < world_size:
            waiting = [w.pipe for rank, w in enumerate(workers) if rank not in results]
            ready = wait(waiting, timeout=_GRACE if failures else None)
            if not ready:
                # A rank failed, and the others wait for it in a collective: replace them.
                for rank in range(world_size):
                    if rank not in results:
                        self._replace(rank)
                break
            for rank, worker in enumerate(workers):
                if worker.pipe in ready and rank not in results:
                    ok, results[rank] = self._receive(rank)
                    if not ok:
                        failures[rank] = results[rank]
        if failures:
            told = (f"rank {rank}: {failure.text}" for rank, failure in failures.items())
            error = WorkerError("\n".join(told))
            error.refusal = next(filter(None, (f.refusal for f in failures.values())), None)
            raise error
        return [results[rank] for rank in range(world_size)]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return self._workers[rank].pipe.recv()
        except EOFError:
            self._replace(rank)
            return False, _Failure("the process died")

    def _replace(self, rank: int) -> None:
        worker = self._workers[rank]
        worker.pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.join()
        self._workers[rank] = self._start(rank)

    def close(self, patience: float = 20.0) -> None:
        """End the workers; kill those that have not ended after ``patience`` seconds each."""
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(patience)
            if worker.process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it may not lead a group yet
                    os.killpg(worker.process.pid, signal.SIGKILL)
                worker.process.kill()
                worker.process.join()
        self._stack.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.close(patience=0.0 if interrupted else 20.0)  # an interrupted task is still running


def device_for(ranks: int) -> Device:
    """Return ``cuda`` if this machine has a GPU for each of ``ranks``, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "cpu"


def work(pipe: Any, rank: int, threads: int, device: Device, scratch: str) -> None:
    """Wait for tasks; a task is run by a fork of this process, which itself starts no threads.

    Args:
        pipe: to the pool, which sends tasks.
        rank, threads, device: see :class:`WorkerPool`.
        scratch: the pool's folder for temporary files, which the pool removes.
    """
    tempfile.tempdir = scratch
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # CUDA does not work in forks of a process that called the CUDA runtime; NVML does no harm.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.setpgrp()  # so that a hanging task can be killed together with its children
    # Whoever interrupts all processes of a job means its owner, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    owner = os.getppid()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # the libraries' warnings, once per task and rank
    while True:
        try:
            # A task's arguments import what it needs. The fork below shares these objects' memory:
            # a garbage collection in the child would write to, and so copy, every page of it.
            with importing():
                world_size, rendezvous, task, args = pipe.recv()
        except EOFError:
            for helper in mp.active_children():
                helper.kill()  # the exit of this process would wait for them
            return
        helpers = _share_helpers()
        child = os.fork()
        if child == 0:
            pipe.send(_run_task(rank, world_size, rendezvous, task, args))
            for started in set(mp.active_children()) - helpers:
                started.terminate()
            os._exit(0)
        status = _wait_for(child, owner)
        if status != 0:
            code = os.waitstatus_to_exitcode(status)
            pipe.send((False, _Failure(f"the process died (exit code {code})")))


def _share_helpers() -> set[Any]:
    """Start once the helpers that a task would start in order to save, and return them."""
    from nemo_megacpp.runtime.orphans import bind_helpers, renew_results_queue

    bind_helpers()
    renew_results_queue()
    return set(mp.active_children())


def _wait_for(child: int, owner: int) -> int:
    """Return the exit status of ``child``; kill this process group if the pool's owner ended."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if os.getppid() != owner:
            os.killpg(0, signal.SIGKILL)
        time.sleep(_POLL)


def _run_task(
    rank: int, world_size: int, rendezvous: str, task: Callable[..., Any], args: Any
) -> tuple[bool, Any]:
    from nemo_megacpp.runtime.distributed import start_process_group

    try:
        start_process_group(rank, world_size, rendezvous)
        return True, task(*args)
    except BaseException as error:
        refusal = str(error) if isinstance(error, UserError) else None
        return False, _Failure(traceback.format_exc(), refusal)
