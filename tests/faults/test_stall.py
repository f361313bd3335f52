"""Ranks of real runs that are stopped, or stand still: the run ends with their name."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nemo_megacpp.runs.events import read_events
from tests.faults.conftest import Run

pytestmark = [pytest.mark.processes, pytest.mark.slow]

Start = Callable[..., Run]

_LIMITS = ("heartbeat_timeout_minutes=0.05", "init_timeout_minutes=2")
_TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2")


def _ended(run: Run, rank: int, place: str) -> str:
    """Return the message of a run that has ended because of ``rank``."""
    assert run.end() == 1, run.output
    (message,) = [line for line in run.output.splitlines() if "The job was ended (" in line]
    assert f"Rank {rank} " in message and place in message
    (stacks,) = (run.run_dir / "logs").glob("stacks-*.txt")
    assert f"Stacks of all ranks: {stacks}" in run.output
    assert "rank 0: process" in stacks.read_text() and "rank 1: process" in stacks.read_text()
    last = read_events(run.run_dir)[-1]
    assert last.kind == "failed" and last.details["reason"] in message
    assert not run.left_behind()
    return message


def _rank(run: Run, rank: int) -> psutil.Process:
    """The process of a rank, under any launcher."""
    (found,) = [
        process
        for process in run.processes()
        if process.environ().get("RANK") == str(rank)
        and "multiprocessing" not in " ".join(process.cmdline())
    ]
    return found


@pytest.mark.parametrize(
    ("rank", "launcher"),
    [
        (1, ()),
        (0, ()),
        (1, _TORCHRUN),
    ],
)
def test_a_stopped_rank_ends_the_run(start: Start, rank: int, launcher: tuple[str, ...]) -> None:
    run = start(f"stopped-{rank}-{len(launcher)}", *_LIMITS, launcher=launcher)
    run.wait_until(lambda: len(run.losses()) >= 3)
    _rank(run, rank).suspend()
    began = time.monotonic()
    message = _ended(run, rank, "it is stopped by a signal")
    assert time.monotonic() - began < 30, "torch's launcher alone would wait for 30 s"
    assert message.lstrip().startswith(("Rank", "error_file", "traceback"))
    if not launcher:
        assert "Traceback" not in run.output


_SLEEP = """

_calls = 0


def _sleep():
    global _calls
    _calls += 1
    if torch.distributed.get_rank() == 1 and _calls == 8:
        import time

        time.sleep(1000)
"""


def test_a_rank_in_a_family_is_named_with_its_line(start: Start, tmp_path: Path) -> None:
    """One rank sleeps in the user's code; the other waits for it in a collective."""
    text = Path("examples/short_conv.py").read_text(encoding="utf-8")
    before = "        gated, _ = self.in_proj(hidden_states)\n"
    assert before in text
    family = tmp_path / "family.py"
    family.write_text(text.replace(before, f"        _sleep()\n{before}") + _SLEEP)
    run = start("family", *_LIMITS, "pattern=CEMR", f"family_modules=[{family}]")
    line = family.read_text().splitlines().index("        time.sleep(1000)") + 1
    message = _ended(run, 1, f"at _sleep ({family}, line {line}), in the module decoder.layers.0")
    assert message.startswith("Rank 1 made no progress for ")
    assert "Rank 0 waits in step " in message
    assert "Traceback" not in run.output
