"""One run at a time in a run folder, and the lock of an owner that is gone is free."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.runs import run_lock
from nemo_megacpp.runs.run_folder import LOCK_FILE, OWNER_FILE
from nemo_megacpp.runs.run_lock import hold_run, validate_not_running
from nemo_megacpp.start import train_recipe

_HOLD = """
import sys, time
from pathlib import Path
from nemo_megacpp.errors import UserError
from nemo_megacpp.runs import run_lock

folder, start, renewal = sys.argv[1:]
run_lock.RENEWAL = float(renewal)
while not Path(start).exists():
    time.sleep(0.001)
try:
    with run_lock.hold_run(Path(folder)):
        print("held", flush=True)
        sys.stdin.readline()
except UserError as error:
    print("refused:", error, flush=True)
"""


class _Contender:
    """A process that takes the lock of ``folder`` once ``start`` exists, and waits."""

    def __init__(self, folder: Path, start: Path, renewal: float = 20.0):
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(folder), str(start), str(renewal)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "SLURM_JOB_ID": "88"},
        )

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.communicate()


@pytest.fixture
def contend(tmp_path: Path) -> Iterator[object]:
    started: list[_Contender] = []

    def start(count: int = 1, renewal: float = 20.0) -> list[_Contender]:
        sign = tmp_path / f"start{len(started)}"
        new = [_Contender(tmp_path / "run", sign, renewal) for _ in range(count)]
        started.extend(new)
        time.sleep(1.5 if count > 1 else 0)  # until all of them wait for the sign
        sign.touch()
        return new

    yield start
    for one in started:
        if one.process.poll() is None:
            one.end()


@pytest.mark.processes
def test_of_eight_at_once_one_wins(contend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    contenders = contend(8)
    said = [one.said() for one in contenders]
    (winner,) = (one for one, line in zip(contenders, said, strict=True) if line == "held")
    refusals = [line for line in said if line != "held"]
    who = f"PID {winner.process.pid} on {socket.gethostname()} (Slurm job 88, since 20"
    assert len(refusals) == 7
    for line in refusals:
        assert line.startswith(f"refused: Another run writes to {tmp_path / 'run'}: ")
        assert who in line
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {"record", "lock", "owner.json"}


@pytest.mark.processes
def test_a_killed_owner_holds_nothing(contend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run_dir = tmp_path / "run"
    (owner,) = contend()
    assert owner.said() == "held"
    owner.process.send_signal(signal.SIGSTOP)  # alive, and it renews nothing
    with pytest.raises(UserError, match=f"stop it .kill {owner.process.pid} on "):
        validate_not_running(run_dir)
    with pytest.raises(UserError, match="Another run writes to"), hold_run(run_dir):
        pytest.fail("the lock of a stopped process was taken")
    owner.end()
    assert (run_dir / LOCK_FILE).exists(), "nothing has removed it"
    validate_not_running(run_dir)
    began = time.monotonic()
    with hold_run(run_dir):
        assert time.monotonic() - began < 1
        with hold_run(run_dir):  # NeMo's logger, in the same process
            pass
        assert (run_dir / LOCK_FILE).exists()
    assert not any((run_dir / "record").iterdir())


def test_a_process_id_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    with hold_run(tmp_path):
        lock, owner = tmp_path / LOCK_FILE, tmp_path / OWNER_FILE
        text, who = lock.read_text(), json.loads(owner.read_text())
    start = next(line for line in text.splitlines() if line.startswith("start="))
    lock.write_text(text.replace(start, f"start={int(start[6:]) - 1}"))
    owner.write_text(json.dumps({**who, "began": who["began"] - 10}))
    validate_not_running(tmp_path)
    with hold_run(tmp_path):
        assert json.loads(owner.read_text())["began"] == who["began"]


def _lock_from_elsewhere(run_dir: Path) -> Path:
    """Write the lock of a process on another host."""
    with hold_run(run_dir):
        text = (run_dir / LOCK_FILE).read_text()
        who = json.loads((run_dir / OWNER_FILE).read_text())
    host = next(line for line in text.splitlines() if line.startswith("host="))
    (run_dir / LOCK_FILE).write_text(text.replace(host, "host=elsewhere"))
    (run_dir / OWNER_FILE).write_text(json.dumps({**who, "host": "elsewhere", "job": "PBS job 3"}))
    return run_dir / LOCK_FILE


def test_a_lock_of_another_host_is_free_when_it_is_not_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "LEASE", 1.5)
    monkeypatch.setattr(run_lock, "RENEWAL", 0.3)
    lock = _lock_from_elsewhere(tmp_path)
    os.utime(lock, (1, 1))  # its clock says nothing
    began = time.monotonic()
    with hold_run(tmp_path):
        assert 1.5 <= time.monotonic() - began < 6
        assert "host=elsewhere" not in lock.read_text()
    told = capsys.readouterr().err
    assert f"{tmp_path} is locked by PID {os.getpid()} on elsewhere (PBS job 3, since 20" in told
    assert told.count("\n") == 1


def test_a_lock_of_another_host_that_is_renewed_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "LEASE", 30.0)
    lock = _lock_from_elsewhere(tmp_path)
    renewal = threading.Timer(1.3, os.utime, (lock,))
    renewal.start()
    began = time.monotonic()
    names_it = r"PID \d+ on elsewhere \(.*kill \d+ on elsewhere"
    with pytest.raises(UserError, match=names_it), hold_run(tmp_path):
        pytest.fail("the lock was taken")
    assert time.monotonic() - began < 5
    renewal.join()


@pytest.mark.processes
def test_a_run_that_lost_its_lock_ends(contend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (owner,) = contend(renewal=0.1)
    assert owner.said() == "held"
    (tmp_path / "run" / LOCK_FILE).unlink()
    assert owner.process.wait(10) == 1
    assert "was lost (marker-missing)" in owner.said()


def test_train_names_the_other_run_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both with ``resume=auto``, as a job that was submitted twice; also as a dry run."""
    run_dir = tmp_path / "run"
    with hold_run(run_dir):
        before = sorted(run_dir.rglob("*"))
        monkeypatch.setattr(os, "getpid", lambda: 1)  # another job than the one that holds it
        for dry in (True, False):
            with pytest.raises(UserError, match=f"Another run writes to {run_dir}: PID "):
                train_recipe(resolve("nam56r_tiny", ["resume=auto", f"run_dir={run_dir}"]), dry)
        monkeypatch.undo()
        assert sorted(run_dir.rglob("*")) == before
