"""The pool: results by rank, failures that are told, and a pool that works on afterwards."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from nemo_megacpp.runtime import distributed, workers
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """A pool of its own: here ranks are made to fail."""
    with WorkerPool(2) as pool:
        pool.run(2, _sum, 1)  # what starting costs is not measured below
        yield pool


def _sum(value: int) -> int:
    total = torch.tensor(value * (torch.distributed.get_rank() + 1))
    torch.distributed.all_reduce(total)
    return int(total)


def _raise_on_one_rank() -> None:
    if torch.distributed.get_rank() == 0:
        raise ValueError("on purpose")
    torch.distributed.barrier()


def _die() -> None:
    if torch.distributed.get_rank() == 1:
        os._exit(7)
    torch.distributed.barrier()


def _hang_on_one_rank() -> None:
    if torch.distributed.get_rank() == 0:
        raise ValueError("on purpose")
    time.sleep(600)


def _identity() -> tuple[int, int, int, int]:
    world_size = torch.distributed.get_world_size()
    return torch.distributed.get_rank(), world_size, os.getpid(), os.getppid()


def test_results_by_rank(pool: WorkerPool) -> None:
    assert pool.size == 2
    assert pool.run(2, _sum, 5) == [15, 15]
    assert pool.run(1, _sum, 5) == [5]
    first, second = pool.run(2, _identity), pool.run(2, _identity)
    assert [(rank, world) for rank, world, *_ in first] == [(0, 2), (1, 2)]
    assert len({pid for *_, pid, _ in first + second}) == 4, "a process per rank and task"
    assert len({parent for *_, parent in first + second}) == 1, "which imports once for all"


def test_one_rank_raises_while_the_other_waits(pool: WorkerPool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 0: (.|\n)*ValueError: on purpose"):
        pool.run(2, _raise_on_one_rank)
    # Far below the five minutes after which a collective gives up by itself.
    assert time.monotonic() - start < 30
    assert pool.run(2, _sum, 2) == [6, 6]


def test_one_rank_dies(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match=r"rank 1: the process died \(exit code 7\)"):
        pool.run(2, _die)
    assert pool.run(2, _sum, 3) == [9, 9]


def test_one_rank_hangs_outside_collectives(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ended and replaced after the grace period."""
    monkeypatch.setattr(workers, "_GRACE", 0.5)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 0: (.|\n)*ValueError: on purpose"):
        pool.run(2, _hang_on_one_rank)
    assert time.monotonic() - start < 60
    assert pool.run(2, _sum, 4) == [12, 12]


_JOIN = distributed.start_process_group
_joined = 0.0
"""When this rank had joined."""


def _join_a_second_apart(rank: int, world_size: int, rendezvous: str) -> None:
    global _joined
    _JOIN(rank, world_size, rendezvous)
    time.sleep(rank)
    _joined = time.monotonic()


def _let_join(apart: bool) -> bool:
    distributed.start_process_group = _join_a_second_apart if apart else _JOIN
    return apart


class _Joining:
    """An argument that sets how ranks join: in the pool's server, of which they are forks."""

    def __init__(self, apart: bool):
        self.apart = apart

    def __reduce__(self) -> tuple[Any, ...]:
        return _let_join, (self.apart,)


def _times(joining: object) -> tuple[float, float]:
    return _joined, time.monotonic()


def test_a_task_starts_once_all_ranks_have_joined(pool: WorkerPool) -> None:
    """A rank that ended before would break the connections that another one is still making."""
    try:
        (_, began), (joined, _) = pool.run(2, _times, _Joining(apart=True))
    finally:
        pool.run(1, _times, _Joining(apart=False))
    assert 0.0 < joined <= began


def _wait_long(ready: str) -> None:
    Path(ready).touch()
    time.sleep(600)


@pytest.mark.slow
def test_an_interrupt_of_all_processes_ends_the_pool_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As from a batch system, which signals every process of a job: those of the pool here, as
    other tests have processes of their own."""
    ready = tmp_path / "ready"

    def interrupt() -> None:
        while not ready.exists():
            time.sleep(0.05)
        server = psutil.Process(process.pid)
        for one in (server, *server.children(recursive=True)):
            one.send_signal(signal.SIGINT)
        time.sleep(1)  # in which a process that is not prepared prints where it was
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), WorkerPool(1) as pool:
        process = pool._server.process
        threading.Thread(target=interrupt, daemon=True).start()
        try:
            pool.run(1, _wait_long, str(ready))
        finally:
            interrupted = time.monotonic()
    assert time.monotonic() - interrupted < 5 and not process.is_alive()
    assert "KeyboardInterrupt" not in capfd.readouterr().err


def _leave_a_folder() -> str:
    return tempfile.mkdtemp()


@pytest.mark.slow
def test_what_tasks_leave_in_the_temporary_folder_goes_with_the_pool() -> None:
    with WorkerPool(1) as pool:
        (left,) = pool.run(1, _leave_a_folder)
        assert Path(left).is_dir()
    assert not Path(left).exists()
