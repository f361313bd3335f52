"""Start the ranks of a run on this machine, with torch elastic's processes and error files."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_megacpp.errors import RankFailed, UserError
from nemo_megacpp.runtime.scratch import scratch_folder

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import PContext, ProcessFailure

_TAIL = 12
"""Lines of a log that the message quotes."""
_POLL = 0.1
"""Seconds between two looks at the ranks."""
_RUN_ID = "nemo_megacpp"
"""Of the ranks that our launcher starts."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""torch's handlers for them raise SignalException."""


@dataclass(frozen=True)
class Launched:
    """The place of this process in a job that torchrun, or another launcher, has started."""

    rank: int
    local_world_size: int
    world_size: int


def launched() -> Launched | None:
    """Return this process's place if a launcher has started it, else None."""
    try:
        return Launched(
            rank=int(os.environ["RANK"]),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    except KeyError:
        return None


def speaks_for_job() -> bool:
    """Whether this process tells the user what a job reads: it is our launcher or no rank at all,
    or rank 0 of another launcher."""
    place = launched()
    ours = os.environ.get("TORCHELASTIC_RUN_ID") == _RUN_ID
    return place is None or (place.rank == 0 and not ours)


def rank_environment(rank: int, world: int, port: int = 0) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank, of a job on one node.

    Args:
        rank: of the process.
        world: number of ranks.
        port: of a ``TCPStore`` on this machine; 0 where a process group exists already.
    """
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return {
        **{name: str(value) for name, value in place.items()},
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": _RUN_ID,
    }


def validate_device_count(world_size: int) -> None:
    """Raise a UserError if a machine with GPUs has fewer of them than there are ranks."""
    import torch

    if torch.cuda.is_available() and world_size > (here := torch.cuda.device_count()):
        raise UserError(
            f"The layout needs {world_size} ranks and this machine has {here} GPUs. Start it on "
            f"several nodes with torchrun, or choose a layout of at most {here} ranks."
        )


def launch(arguments: Sequence[str], ranks: int, log_dir: Path) -> None:
    """Run ``python arguments…`` on ``ranks`` local ranks and wait for all of them.

    Rank 0 writes to this terminal; its errors and the output of the other ranks are saved under
    ``log_dir``. When a rank fails, the others are ended. SIGTERM is passed on to the ranks, which
    decide when to end.

    Raises:
        RankFailed: with the exception of the rank that failed first, or the end of its log.
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import SignalException

    log_dir.mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp(prefix="attempt-", dir=log_dir))
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    # Not in the run's folder, whose disk may be what is full.
    with scratch_folder() as errors, _own_handlers():
        sigterm = threading.Event()
        try:
            context = _start(arguments, ranks, logs, errors, store.port)
            _pass_on_sigterm(context, sigterm)
            failures, alive = _wait(context)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + error.sigval)
        if failures:
            raise _root_cause(failures, alive, errors, logs, sigterm.is_set())


def _start(arguments: Sequence[str], ranks: int, logs: Path, errors: Path, port: int) -> PContext:
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, start_processes

    class Logs(LogsSpecs):
        """Where torch writes what the ranks print, and where the ranks write their errors."""

        @property
        def root_log_dir(self) -> str:
            return str(logs)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            stderrs = {rank: str(logs / f"rank{rank}-stderr.log") for rank in envs}
            return LogsDest(
                stdouts={r: str(logs / f"rank{r}-stdout.log") if r else "" for r in envs},
                stderrs=stderrs,
                tee_stderrs={0: stderrs[0]},
                error_files={rank: env["TORCHELASTIC_ERROR_FILE"] for rank, env in envs.items()},
            )

    for name in ("api", "subprocess_handler"):  # what failed is reported in one place, and here
        logger = logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}")
        logger.setLevel(logging.CRITICAL)
    settings = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")
        or str(max(1, (os.cpu_count() or 1) // ranks)),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # the order of streams that Megatron relies on
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
    }
    return start_processes(
        "rank",
        sys.executable,
        dict.fromkeys(range(ranks), tuple(arguments)),
        {
            rank: {
                **rank_environment(rank, ranks, port),
                **settings,
                "TORCHELASTIC_ERROR_FILE": str(errors / f"{rank}.json"),
            }
            for rank in range(ranks)
        },
        Logs(),
        log_line_prefixes={0: " "},
    )


def _wait(context: PContext) -> tuple[Mapping[int, ProcessFailure], float]:
    """Wait until all ranks have ended well, or one has not and torch has ended the others.

    Returns:
        The failures by rank, in the order in which they were seen, and the time at which all ranks
        were last seen alive.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    alive = time.time()
    try:
        while True:
            now = time.time()
            if (result := context.wait(timeout=0)) is not None:
                return result.failures, alive
            alive = now
            time.sleep(_POLL)
    except SignalException as error:
        for pid in context.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)  # a stopped process receives no other signal
        context.close(error.sigval)
        raise


def _root_cause(
    failures: Mapping[int, ProcessFailure], alive: float, errors: Path, logs: Path, sigterm: bool
) -> RankFailed:
    """Return the error of the rank that failed first; ranks that lose a peer raise errors, too."""
    from nemo_megacpp.runtime.rank_errors import read_error

    first, failure = next(iter(failures.items()))
    if sigterm and failure.exitcode == -signal.SIGTERM:
        return RankFailed("SIGTERM arrived before training had started.")
    written = [
        error
        for path in errors.glob("*.json")
        if (error := read_error(path, int(path.stem))) is not None
    ]
    if refused := [error for error in written if error.user_error]:
        return RankFailed(min(refused, key=lambda error: error.time).message, user_error=True)
    if stalls := [error for error in written if error.stall]:
        return RankFailed(stalls[0].message)
    # A killed rank wrote nothing, and what others raised afterwards is not the cause.
    if not (errors / f"{first}.json").exists():
        written = [error for error in written if error.time < alive]
    if written:
        cause = min(written, key=lambda error: error.time)
        log = logs / f"rank{cause.rank}-stderr.log"
        return RankFailed(f"Rank {cause.rank} failed: {cause.message}\nIts traceback: {log}")
    log = logs / f"rank{first}-stderr.log"
    lines = log.read_text(errors="replace").splitlines()[-_TAIL:]
    tail = "".join(f"\n  {line}" for line in lines)
    return RankFailed(
        f"Rank {first} ended with exit code {failure.exitcode}. The end of {log}:{tail}"
    )


def _pass_on_sigterm(context: PContext, came: threading.Event) -> None:
    """Pass SIGTERM on to the ranks and go on waiting: torch would kill them after 30 seconds."""

    def pass_on(number: int, frame: object) -> None:
        came.set()
        for pid in context.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, pass_on)


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Restore this process's signal handlers at the end: torch leaves its own."""
    own = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in own.items():
                signal.signal(number, handler)
