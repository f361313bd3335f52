"""Ranks that are interrupted from the terminal, and ranks that fail."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_megacpp.errors import RankFailed
from nemo_megacpp.runtime.launch import launch

_INTERRUPT = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"


def test_an_interrupt_ends_the_ranks_and_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And leaves Ctrl-C to do what it did: torch's launcher would keep it for itself."""
    own = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(["-c", _INTERRUPT], 1, tmp_path)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, own)
    told = capfd.readouterr()
    assert "signal" not in told.out + told.err


_STOP = """
import os, signal, subprocess
subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -INT {os.getppid()}"])
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_an_interrupt_ends_a_stopped_rank_at_once(tmp_path: Path) -> None:
    """It receives no signal but SIGCONT, and SIGKILL, which torch sends after 30 s."""
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch(["-c", _STOP], 1, tmp_path)
    assert time.monotonic() - began < 20


_RANK = """
import os, signal, sys, time
from nemo_megacpp.errors import UserError
from nemo_megacpp.runtime.rank_errors import record_failure

def main():
    rank = int(os.environ["RANK"])
    print("rank", rank, file=sys.stderr)
    {body}

record_failure(main)()
"""


def _fail(tmp_path: Path, body: str) -> RankFailed:
    """Return how two ranks fail that run ``body``."""
    script = tmp_path / "script.py"
    script.write_text(_RANK.format(body=body.strip().replace("\n", "\n    ")))
    with pytest.raises(RankFailed) as failed:
        launch([str(script)], 2, tmp_path / "logs")
    return failed.value


@pytest.mark.processes
def test_the_first_exception_is_the_cause(tmp_path: Path) -> None:
    """Rank 1 raises; rank 0, which loses it, raises a moment later and ends first."""
    failed = _fail(
        tmp_path,
        """
if rank == 1:
    try:
        raise ValueError("on purpose")
    finally:
        import atexit
        atexit.register(time.sleep, 2)
time.sleep(1)
raise RuntimeError("connection closed by peer")
""",
    )
    first, second = str(failed).splitlines()
    assert (
        first == f"Rank 1 failed: ValueError: on purpose ({tmp_path}/script.py, line 11, in main)"
    )
    log = Path(second.removeprefix("Its traceback: "))
    assert "ValueError: on purpose" in log.read_text()
    assert not failed.user_error


@pytest.mark.processes
def test_a_user_error_comes_first_and_stands_alone(tmp_path: Path) -> None:
    failed = _fail(
        tmp_path,
        """
started = __file__ + ".started"
if rank == 0:
    while not os.path.exists(started):
        time.sleep(0.01)
    raise RuntimeError("connection closed by peer")
open(started, "w").close()
time.sleep(0.1)
raise UserError("lr=1e30 is too high.")
""",
    )
    assert str(failed) == "lr=1e30 is too high."
    assert failed.user_error


@pytest.mark.processes
def test_a_killed_rank_is_the_cause_of_what_others_raise(tmp_path: Path) -> None:
    failed = _fail(
        tmp_path,
        """
if rank == 1:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(3)
raise RuntimeError("connection closed by peer")
""",
    )
    first, last = str(failed).splitlines()
    assert first.startswith("Rank 1 ended with exit code -9. The end of ")
    assert last == "  rank 1"


@pytest.mark.processes
def test_torchrun_names_the_root_cause(tmp_path: Path) -> None:
    """A rank of torchrun writes its refusal where torchrun reads it: the message, no traceback."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"),
            *("--log-dir", str(tmp_path), "-m", "nemo_megacpp.cli"),
            *("train", "nam56r_tiny", "max_steps=-1"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    summary = done.stderr.partition("Root Cause (first observed failure)")[2]
    assert "exitcode  : 2" in summary, done.stderr
    (error,) = tmp_path.glob("**/error.json")
    message = json.loads(error.read_text())["message"]["message"]
    assert message == "max_steps: -1 must be at least 1."
    assert message in summary
    assert "Traceback" not in summary
