"""One run at a time in a run folder: a lock that ends with its owner.

The lock is filelock's ``SoftFileLease``: a file that is created exclusively, as NFS and Lustre can,
names host, process, its start and the boot, and is renewed by its owner. On the owner's host a dead
owner is seen at once, even where its process id is used again. From another host it cannot be seen,
and the lock is free when it was not renewed for :data:`LEASE` seconds of the clock of the process
that waits, so that clocks need not agree.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from typing_extensions import TypedDict

from nemo_megacpp.errors import UserError
from nemo_megacpp.json_files import Count, Text, read_json
from nemo_megacpp.printable import say
from nemo_megacpp.runs.run_folder import LOCK_FILE, OWNER_FILE

if TYPE_CHECKING:
    from filelock import LeaseCompromise, SoftFileLease

LEASE = 120.0
"""Seconds without a renewal after which an owner on another host counts as gone."""
RENEWAL = 20.0
"""Seconds between two renewals."""

_RACE = 1.0
"""Seconds for taking the lock of an owner that is known to be gone."""
_POLL = 0.1
_LIMIT = 1 << 16
_JOB_IDS = {"SLURM_JOB_ID": "Slurm job", "PBS_JOBID": "PBS job", "LSB_JOBID": "LSF job"}

_held: dict[Path, SoftFileLease] = {}
"""The locks of this process; filelock releases one that nothing refers to."""


class _Owner(TypedDict):
    """Who holds a lock, for the message and to see whether it lives on this host."""

    host: Text
    namespace: Count
    pid: Count
    began: float
    job: Text | None
    since: Text


@contextlib.contextmanager
def hold_run(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is created if it does not exist.

    Where this process, or the launcher that started it, holds the lock already, this does nothing.

    Raises:
        UserError: another run holds it, or it cannot be written. Where the owner is on another
            host, this takes up to :data:`LEASE` seconds.
    """
    taken = _take(run_dir)
    try:
        yield
    finally:
        if taken:
            _release(run_dir)


def hold_run_to_exit(run_dir: Path) -> bool:
    """Hold the lock of a run folder until this process ends; see :func:`hold_run`.

    Returns:
        False where this job held it already.
    """
    taken = _take(run_dir)
    if taken:
        atexit.register(_release, run_dir)
    return taken


def validate_not_running(run_dir: Path) -> None:
    """Refuse a folder that a live run on this host holds; writes nothing.

    Raises:
        UserError: naming the run.
    """
    owner = _live_owner(run_dir)
    if owner is not None and not _is_of_this_job(owner):
        raise _refusal(run_dir)


def _take(run_dir: Path) -> bool:
    """Take the lock; return False where this job has it."""
    from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

    path = run_dir / LOCK_FILE
    owner = _live_owner(run_dir)
    if owner is not None and _is_of_this_job(owner):
        return False
    lease = SoftFileLease(
        path,
        lease_duration=LEASE,
        heartbeat_interval=RENEWAL,
        on_compromise=_end_process,
        thread_local=False,
        poll_interval=_POLL,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lease.acquire(timeout=_RACE)
        except Timeout:
            _outwait(lease, run_dir)
        _held[run_dir] = lease
        _write_owner(run_dir)
    except (Timeout, LeaseSettingsMismatch):
        raise _refusal(run_dir) from None
    except OSError as error:
        _release(run_dir)
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None
    return True


def _outwait(lease: SoftFileLease, run_dir: Path) -> None:
    """Take the lock of an owner on another host if it is not renewed any more.

    Raises:
        Timeout: the owner lives.
    """
    from filelock import Timeout

    owner = _owner(run_dir)
    if owner is not None and _is_here(owner):
        raise _refusal(run_dir)
    say(
        f"{run_dir} is locked by {_name(owner, lease)}. Waiting up to {LEASE:.0f} s to see whether "
        f"that run is still alive.",
        error=True,
    )
    path = run_dir / LOCK_FILE
    renewed, give_up = _changed(path), time.monotonic() + LEASE + 2 * RENEWAL
    while True:
        try:
            lease.acquire(timeout=_RACE)
            return
        except Timeout:
            if _changed(path) != renewed or time.monotonic() > give_up:
                raise


def _changed(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _release(run_dir: Path) -> None:
    lease = _held.pop(run_dir, None)
    if lease is not None and lease.is_lock_held_by_us:  # not so in a process forked from the owner
        with contextlib.suppress(OSError):
            (run_dir / OWNER_FILE).unlink()
        lease.release()


def _end_process(lost: LeaseCompromise) -> None:
    """End this process at once, with the ranks it started: its folder may be another run's now."""
    say(
        f"The lock {lost.lock_file} was lost ({lost.reason}): another run may hold its folder now. "
        f"This run ends here, and writes nothing more into it.",
        error=True,
    )
    os._exit(1)


# --- the owner


def _write_owner(run_dir: Path) -> None:
    jobs = (f"{name} {os.environ[key]}" for key, name in _JOB_IDS.items() if key in os.environ)
    owner: _Owner = {
        "host": socket.gethostname(),
        "namespace": _namespace(),
        "pid": os.getpid(),
        "began": psutil.Process().create_time(),
        "job": next(jobs, None),
        "since": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }
    partial = (run_dir / OWNER_FILE).with_suffix(".partial")
    partial.write_text(json.dumps(owner), encoding="utf-8")
    partial.rename(run_dir / OWNER_FILE)


def _owner(run_dir: Path) -> _Owner | None:
    from pydantic import TypeAdapter

    with contextlib.suppress(UserError):
        return read_json(run_dir / OWNER_FILE, TypeAdapter(_Owner), _LIMIT)
    return None


def _namespace() -> int:
    """Return the number of this process's PID namespace: containers may share a host's name."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _is_here(owner: _Owner) -> bool:
    return (owner["host"], owner["namespace"]) == (socket.gethostname(), _namespace())


def _live_owner(run_dir: Path) -> _Owner | None:
    """Return the owner of the lock if it is alive on this host."""
    owner = _owner(run_dir)
    if owner is None or not _is_here(owner) or not (run_dir / LOCK_FILE).exists():
        return None
    with contextlib.suppress(psutil.Error):
        if abs(psutil.Process(owner["pid"]).create_time() - owner["began"]) < 1:
            return owner
    return None


def _is_of_this_job(owner: _Owner) -> bool:
    """Whether the owner is this process, or the launcher that started it."""
    return owner["pid"] in (os.getpid(), os.getppid())


def _name(owner: _Owner | None, lease: SoftFileLease | None = None) -> str:
    if owner is None:
        record = lease.owner if lease is not None else None
        return f"PID {record.pid} on {record.hostname}" if record is not None else "another run"
    job = f"{owner['job']}, " if owner["job"] else ""
    return f"PID {owner['pid']} on {owner['host']} ({job}since {owner['since']})"


def _refusal(run_dir: Path) -> UserError:
    owner = _owner(run_dir)
    stop = f"kill {owner['pid']} on {owner['host']}" if owner else "SIGTERM"
    return UserError(
        f"Another run writes to {run_dir}: {_name(owner)}. Wait until it has ended, stop it "
        f"({stop} makes it save a checkpoint and end), or choose another run_dir."
    )
