"""Start the ranks of a run on this machine, through torch's elastic launcher."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_megacpp.errors import RankFailed, UserError
from nemo_megacpp.runtime.stopping import passed_on

_LAST_WORDS = "NEMO_MEGACPP_LAST_WORDS"
"""Environment variable that names a folder for what ranks have to say to the user at their end; not
in the run's folder, whose disk may be what is full."""

_TAIL = 12
_ELASTIC_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


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


def be_launched(rank: int, world: int) -> None:
    """Take the place that torchrun would have given this process."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", TORCHELASTIC_RUN_ID="proof")


def leave_last_words(message: str) -> None:
    """Tell the launcher, from a rank of :func:`launch` that is about to end, why it does.

    Other ranks may end before this one, for want of it, and are not asked then.
    """
    with contextlib.suppress(OSError):
        (Path(os.environ[_LAST_WORDS]) / os.environ["RANK"]).write_text(message, encoding="utf-8")


def devices_here() -> int:
    """Return how many ranks this machine can hold: its GPUs, or any number without GPUs."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else sys.maxsize


def launch(arguments: Sequence[str], ranks: int, log_dir: Path) -> None:
    """Run ``python arguments…`` on ``ranks`` local ranks and wait for all of them.

    Rank 0 writes to this terminal; the other ranks' output, and rank 0's errors, are kept under
    ``log_dir``. If a rank fails, the others are ended. SIGTERM is passed on to the ranks, which
    end when they are ready to.

    Raises:
        RankFailed: with what a rank said to the user, or the end of the failing rank's log.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_elastic()
    log_dir.mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp(prefix="attempt-", dir=log_dir))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="local",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(
            log_dir=str(logs),
            redirects=dict.fromkeys(range(1, ranks), Std.ALL),
            tee={0: Std.ERR},
        ),
        log_line_prefix_template=" ",
        signals_to_handle=",".join(signal.Signals(number).name for number in _ELASTIC_SIGNALS),
    )
    with tempfile.TemporaryDirectory(prefix="nemo-megacpp-ranks-") as words:
        settings = {**_worker_environment(ranks), _LAST_WORDS: words}
        try:
            with _environment(settings), _own_signals(), passed_on() as asked_to_stop:
                elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if asked_to_stop.is_set() and failure.exitcode == -signal.SIGTERM:
                told = "SIGTERM came before the ranks had begun to train."
                raise RankFailed(told, False) from None
            last_words = _last_words(Path(words))
            report = last_words or _report(logs, rank, failure.exitcode)
            raise RankFailed(report, last_words is not None) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + error.sigval)


def _silence_elastic() -> None:
    """What failed is reported in one place, and here. Each of torch's loggers has its own level."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Put this process's handlers back at the end: torch's launcher leaves its own there."""
    own = {number: signal.getsignal(number) for number in _ELASTIC_SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in own.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    previous = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _worker_environment(ranks: int) -> dict[str, str]:
    """Return settings of the process, not of the model: threads, and Megatron's stream order."""
    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
    }


def _last_words(words: Path) -> str | None:
    """Return what a rank had to say to the user, the lowest that had; None if none had."""
    for file in sorted(words.iterdir(), key=lambda path: int(path.name)):
        if message := file.read_text(encoding="utf-8"):
            return message
    return None


def _report(logs: Path, rank: int, exit_code: int) -> str:
    files = sorted(logs.glob(f"**/{rank}/stderr.log"))
    lines = files[-1].read_text(errors="replace").splitlines() if files else []
    tail = "\n".join(f"  {line}" for line in lines[-_TAIL:])
    return f"Rank {rank} ended with exit code {exit_code}. The end of {logs}:\n{tail}"


def validate_device_count(world_size: int) -> None:
    """Refuse to start more ranks here than there are GPUs.

    Raises:
        UserError: with both numbers.
    """
    here = devices_here()
    if world_size > here:
        raise UserError(
            f"The layout needs {world_size} ranks and this machine has {here} GPUs. Start it on "
            f"several nodes with torchrun, or choose a layout of at most {here} ranks."
        )
