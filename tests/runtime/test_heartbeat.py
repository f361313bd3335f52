"""Ranks that stop, or that stand still, in jobs of our launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nemo_megacpp.errors import RankFailed
from nemo_megacpp.runtime.launch import launch, rank_environment

pytestmark = pytest.mark.processes

_LIMIT = 1.5
"""Seconds."""

_NO_LAUNCHER = {"TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_RUN_ID": "none"}

_RANK = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from nemo_megacpp.runtime import heartbeat

folder = Path(sys.argv[1])
limits = heartbeat.Limits({limit}, 30.0)
heartbeat.start(limits, folder, lambda message, steps: (folder / "said").write_text(str(steps)))
dist.init_process_group("gloo")
rank = dist.get_rank()

def stand_still():
    {fault}

class Family(torch.nn.Module):
    def forward(self, x, step):
        if step == 5:
            stand_still()
        dist.all_reduce(x)
        return x

model = Family()
for step in range({steps}):
    heartbeat.progress(f"step {{step + 1}}", slow=step == 0, steps=step)
    time.sleep(0.05)
    model(torch.ones(2), step)
    (folder / f"rank{{rank}}").write_text(str(step))
dist.destroy_process_group()
heartbeat.stop()
"""


def _script(folder: Path, fault: str = "pass", steps: int = 1000) -> list[str]:
    script = folder / "script.py"
    script.write_text(_RANK.format(limit=_LIMIT, fault=fault, steps=steps))
    return [str(script), str(folder)]


def _stall(folder: Path, capfd: pytest.CaptureFixture[str], fault: str, ranks: int = 2) -> str:
    """Return how a job ends of which a rank does ``fault`` in step 6."""
    with pytest.raises(RankFailed) as failed:
        launch(_script(folder, fault), ranks, folder / "logs")
    assert not failed.value.user_error
    assert (folder / "said").read_text() == "5"
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info)]
    told = capfd.readouterr()
    assert "Traceback" not in told.out + told.err
    (stacks,) = folder.glob("stacks-*.txt")
    message, last = str(failed.value).splitlines()
    assert last == f"Stacks of all ranks: {stacks}"
    assert all(f"rank {rank}: process" in stacks.read_text() for rank in range(ranks))
    assert message.endswith(
        f"The job was ended (heartbeat_timeout_minutes={_LIMIT / 60:g}, init_timeout_minutes=0.5)."
    )
    return message


def test_a_stopped_rank_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And ended, which torch's launcher does after 30 seconds."""
    fault = "if rank == 1: (folder / 'at').touch(); time.sleep(0.3); os.kill(os.getpid(), 19)"
    message = _stall(tmp_path, capfd, fault)
    waited = time.time() - (tmp_path / "at").stat().st_mtime
    assert message.startswith("Rank 1 (process ")
    assert "it is stopped by a signal (SIGSTOP or SIGTSTP)." in message
    assert "It was last seen in step 6, at stand_still (" in message
    assert "Rank 0 waits in step 6, at all_reduce, called by Family.forward (" in message
    assert waited < 6 * _LIMIT


def test_a_rank_in_the_users_code_is_named_with_its_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rank whose heartbeats the store sees last is not the one to blame."""
    message = _stall(tmp_path, capfd, "rank == 0 and time.sleep(1000)")
    line = (tmp_path / "script.py").read_text().splitlines().index("def stand_still():") + 2
    assert message.startswith("Rank 0 made no progress for ")
    place = f"at stand_still ({tmp_path}/script.py, line {line})."
    assert f"Rank 0 is in step 6, {place} Rank 1 waits in step 6, at all_reduce" in message


@pytest.mark.slow
def test_ranks_in_different_collectives_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    message = _stall(tmp_path, capfd, "rank == 1 and dist.recv(torch.ones(1), 0)")
    assert message.startswith("No rank made progress for ")
    assert "Rank 0 waits in step 6, at all_reduce, called by Family.forward (" in message
    assert "Rank 1 waits in step 6, at recv, called by stand_still (" in message


@pytest.mark.slow
def test_a_job_that_is_suspended_as_a_whole_goes_on(tmp_path: Path) -> None:
    """As Slurm does it, or a user who stops the ranks and lets them continue."""
    arguments = _script(tmp_path, steps=40)
    suspended = []

    def ranks() -> list[psutil.Process]:
        return [p for p in psutil.Process().children() if arguments[0] in p.cmdline()]

    def suspend() -> None:
        _wait_until(lambda: all((tmp_path / f"rank{rank}").exists() for rank in range(2)))
        found = ranks()
        for process in found:
            process.send_signal(signal.SIGSTOP)
        time.sleep(2 * _LIMIT)
        for process in found:
            process.send_signal(signal.SIGCONT)
        suspended.extend(found)

    thread = threading.Thread(target=suspend)
    thread.start()
    launch(arguments, 2, tmp_path / "logs")
    thread.join()
    assert len(suspended) == 2
    assert (tmp_path / "rank1").read_text() == "39"


@pytest.mark.slow
def test_the_rank_that_holds_the_store_is_named(tmp_path: Path) -> None:
    """Under srun rank 0 does: with it stopped, no other rank can ask anyone anything."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    # Rank 1 has to know rank 0's process before.
    fault = f"rank == 0 and (time.sleep({_LIMIT / 2}), os.kill(os.getpid(), signal.SIGSTOP))"
    arguments = _script(tmp_path, fault)
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **rank_environment(rank, 2, port)} | _NO_LAUNCHER,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    _, told = ranks[1].communicate(timeout=120)
    assert (ranks[1].returncode, ranks[0].wait(10)) == (1, -signal.SIGKILL)
    (message,) = [line for line in told.splitlines() if "store" in line]
    assert f"The job's store at localhost:{port} has not answered for " in message
    assert "Rank 1 is in step 6, at all_reduce, called by Family.forward (" in message
    assert "Traceback" not in told


def _wait_until(reached: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < give_up
        time.sleep(0.01)
