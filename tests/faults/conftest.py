"""Runs of the command line that something happens to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_megacpp.data.prepare import prepare
from tests.faults.workplace import RECIPE, SETTINGS

_PATIENCE = 300.0
"""Seconds for what takes a few on an idle machine."""
_MARK = "NEMO_MEGACPP_TEST_RUN"
"""Environment variable by which the processes of a run are known, orphans too."""


class Run:
    """``train nam56r_tiny`` with a small model on two ranks, as a process of its own."""

    def __init__(self, run_dir: Path, output: Path, command: list[str], **start: Any):
        self.run_dir = run_dir
        self._mark = uuid.uuid4().hex
        self._output = output
        with output.open("w") as stream:
            self.process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, _MARK: self._mark, "OMP_NUM_THREADS": "1"},
                **start,
            )

    @property
    def output(self) -> str:
        """What it has written to the terminal."""
        return self._output.read_text()

    def losses(self) -> dict[int, float]:
        """Loss of each step so far."""
        path = self.run_dir / "record" / "metrics.jsonl"
        records = map(json.loads, path.read_text().splitlines() if path.exists() else ())
        return {record["step"]: record["loss"] for record in records if "loss" in record}

    def wait_until(self, reached: Callable[[], object]) -> None:
        """Wait for something of this run."""
        give_up = time.monotonic() + _PATIENCE
        while not reached():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < give_up, self.output
            time.sleep(0.005)

    def end(self) -> int:
        """Wait for the end; return the exit code."""
        return self.process.wait(_PATIENCE)

    def processes(self) -> list[psutil.Process]:
        """Processes of this run, whoever their parent is now."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank."""
        (found,) = [
            process
            for process in psutil.Process(self.process.pid).children()
            if "nemo_megacpp.nemo.worker" in process.cmdline()
            and process.environ()["RANK"] == str(rank)
        ]
        return found

    def left_behind(self) -> list[str]:
        """What still runs some seconds after the end."""
        give_up = time.monotonic() + 30
        while (left := self.processes()) and time.monotonic() < give_up:
            time.sleep(0.05)
        return [" ".join(process.cmdline()) for process in left]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == self._mark
        except psutil.Error:
            return False


def train_command(
    run_dir: Path, data: Path, *overrides: str, launcher: tuple[str, ...] = ()
) -> list[str]:
    """Return the command that trains the small model."""
    usual = [*SETTINGS, f"data={data}", f"run_dir={run_dir}"]
    chosen = dict(word.split("=", 1) for word in [*usual, *overrides])
    settings = [f"{key}={value}" for key, value in chosen.items()]
    return [sys.executable, *launcher, "-m", "nemo_megacpp.cli", "train", RECIPE, *settings]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """Return a function that starts a run: ``start("name", "key=value", …, launcher=…)``."""
    root = tmp_path_factory.mktemp("faults")
    (root / "texts").mkdir()
    for number in range(8):
        words = (f"word{number} and {count} more, for a start" for count in range(100))
        (root / "texts" / f"{number}.txt").write_text("\n".join(words))
    data = root / "data"
    prepare([root / "texts"], data, vocab_size=300, held_out=0.3, progress=False)
    runs: list[Run] = []

    def start(name: str, *overrides: str, launcher: tuple[str, ...] = (), **options: Any) -> Run:
        command = train_command(root / name, data, *overrides, launcher=launcher)
        runs.append(Run(root / name, root / f"{name}-{len(runs)}.log", command, **options))
        return runs[-1]

    yield start
    for run in runs:
        for process in run.processes():
            process.kill()
