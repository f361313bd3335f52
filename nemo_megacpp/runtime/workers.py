"""A pool of ranks that run one distributed task after another.

Starting a process and importing Megatron takes seconds, and hundreds of megabytes; a parity run
needs dozens of layouts. The pool starts one server, which imports what a task needs and forks a
process for every rank of it: this joins a process group, runs the task and ends. So neither
Megatron's global state nor the sockets and threads of its process groups, to which autograd graphs
may refer, outlive a task.
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
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any, Literal, NamedTuple

import torch
from torch import multiprocessing as mp

from nemo_megacpp.errors import RankFailed, UserError
from nemo_megacpp.runtime.imports import importing
from nemo_megacpp.runtime.orphans import bind_helpers, call_bound, renew_results_queue
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


class _Server(NamedTuple):
    """The process that forks the ranks, a pipe to it, and one from each rank's process."""

    process: Any
    tasks: Any
    results: list[Any]


class WorkerPool:
    """Ranks 0 to ``size - 1``.

    Args:
        size: most ranks of a task.
        threads: torch threads per rank.
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
        self.size, self._threads, self.device = size, threads, device
        self._stack = contextlib.ExitStack()
        self._scratch = self._stack.enter_context(scratch_folder())
        self._tasks = 0
        self._server = self._start()

    def _start(self) -> _Server:
        context = mp.get_context("spawn")
        tasks, server_end = context.Pipe()
        pipes = [context.Pipe() for _ in range(self.size)]
        ends = [there for _, there in pipes]
        # Linux ends a bound process with the thread that started it.
        main = threading.current_thread() is threading.main_thread()
        process = context.Process(
            target=call_bound,
            args=(
                *(os.getpid() if main else 0, __name__, "serve"),
                *(server_end, ends, self._threads, self.device, str(self._scratch)),
            ),
        )
        process.start()
        for end in (server_end, *ends):
            end.close()
        return _Server(process, tasks, [here for here, _ in pipes])

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
        self._server.tasks.send((world_size, f"file://{store}", task, args))
        pipes = self._server.results[:world_size]
        lost = False
        results: dict[int, Any] = {}
        failures: dict[int, _Failure] = {}
        while len(results) < world_size:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(waiting, timeout=_GRACE if failures else None)
            if not ready:
                lost = True  # a rank failed, and the others wait for it in a collective
                break
            for rank, pipe in enumerate(pipes):
                if pipe in ready and rank not in results:
                    try:
                        ok, results[rank] = pipe.recv()
                    except EOFError:
                        ok, results[rank], lost = False, _Failure("the process died"), True
                    if not ok:
                        failures[rank] = results[rank]
        if lost:
            self._restart()
        if failures:
            told = (f"rank {rank}: {failure.text}" for rank, failure in failures.items())
            error = WorkerError("\n".join(told))
            error.refusal = next(filter(None, (f.refusal for f in failures.values())), None)
            raise error
        return [results[rank] for rank in range(world_size)]

    def _restart(self) -> None:
        for pipe in (self._server.tasks, *self._server.results):
            pipe.close()
        self._kill()
        self._server = self._start()

    def _kill(self) -> None:
        """Kill the server with the ranks and helpers that it started."""
        process = self._server.process
        with contextlib.suppress(ProcessLookupError):  # it may not lead a group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()

    def close(self, patience: float = 20.0) -> None:
        """End the server; kill it if it has not ended after ``patience`` seconds."""
        for pipe in (self._server.tasks, *self._server.results):
            pipe.close()
        self._server.process.join(patience)
        if self._server.process.is_alive():
            self._kill()
        self._stack.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.close(patience=0.0 if interrupted else 20.0)  # an interrupted task is still running


def device_for(ranks: int) -> Device:
    """Return ``cuda`` if this machine has a GPU for each of ``ranks``, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "cpu"


def serve(pipe: Any, results: Sequence[Any], threads: int, device: Device, scratch: str) -> None:
    """Wait for tasks; a task is run by forks of this process, which itself starts no threads.

    Args:
        pipe: to the pool, which sends tasks.
        results: pipes to the pool, one for each rank.
        threads, device: see :class:`WorkerPool`.
        scratch: the pool's folder for temporary files, which the pool removes.
    """
    tempfile.tempdir = scratch
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # CUDA does not work in forks of a process that called the CUDA runtime; NVML does no harm.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.setpgrp()  # so that hanging ranks can be killed together with their children
    # Whoever interrupts all processes of a job means its owner, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    owner = os.getppid()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # the libraries' warnings, once per task and rank
    while True:
        try:
            # A task's arguments import what it needs. The forks below share these objects' memory:
            # a garbage collection in a child would write to, and so copy, every page of it.
            with importing():
                world_size, rendezvous, task, args = pipe.recv()
        except EOFError:
            for helper in mp.active_children():
                helper.kill()  # the exit of this process would wait for them
            return
        helpers = _share_helpers()
        ranks: dict[int, int] = {}
        queues = []  # they last as long as these objects
        for rank in range(world_size):
            queues.append(renew_results_queue())
            child = os.fork()
            if child == 0:
                results[rank].send(_run_task(rank, world_size, rendezvous, task, args))
                for started in set(mp.active_children()) - helpers:
                    started.terminate()
                os._exit(0)
            ranks[child] = rank
        while ranks:
            child, status = _wait_for(list(ranks), owner)
            rank = ranks.pop(child)
            if status != 0:
                code = os.waitstatus_to_exitcode(status)
                results[rank].send((False, _Failure(f"the process died (exit code {code})")))


def _share_helpers() -> set[Any]:
    """Start once the helpers that a task would start in order to save, and return them."""
    bind_helpers()
    return set(mp.active_children())


def _wait_for(children: Sequence[int], owner: int) -> tuple[int, int]:
    """Return a child that ended and its exit status; kill this process group if the pool's owner
    ended."""
    while True:
        for child in children:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return child, status
        if os.getppid() != owner:
            os.killpg(0, signal.SIGKILL)
        time.sleep(_POLL)


def _run_task(
    rank: int, world_size: int, rendezvous: str, task: Callable[..., Any], args: Any
) -> tuple[bool, Any]:
    from nemo_megacpp.runtime.distributed import start_process_group

    try:
        start_process_group(rank, world_size, rendezvous)
        if torch.distributed.get_backend() == "gloo":
            # The end of a rank breaks the connections that another one is still making to it.
            torch.distributed.barrier()
        return True, task(*args)
    except BaseException as error:
        refusal = str(error) if isinstance(error, UserError) else None
        return False, _Failure(traceback.format_exc(), refusal)
