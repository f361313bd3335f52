"""Run the tests with ranks and those without beside each other, each half in a pytest of its own.

A rank waits for others, and a test that starts a command waits for it: one pytest leaves one of two
cores idle for much of the time. The first half is shown as it runs, the second at its end::

    python -m tests.halves -m "not slow" -x
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HALVES = ("ranks", "not ranks")
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|deselected|xfailed|xpassed|errors?|warnings?)\b")
_NO_TESTS = 5
"""Pytest's exit code if nothing was selected."""


def summary(last_lines: list[str], seconds: float) -> str:
    """Return the last line that one pytest would have printed for all that was run.

    What one half deselects the other runs, so that is left out.
    """
    counts: Counter[str] = Counter()
    for line in last_lines:
        for number, outcome in _COUNT.findall(line):
            counts[outcome.removesuffix("s") if outcome == "errors" else outcome] += int(number)
    del counts["deselected"]
    order = ("failed", "passed", "skipped", "xfailed", "xpassed", "warnings", "warning", "error")
    said = [f"{counts[outcome]} {outcome}" for outcome in order if counts[outcome]]
    return f"{', '.join(said) or 'no tests ran'} in {seconds:.2f}s"


def exit_code(codes: list[int]) -> int:
    """Return the worst of the halves' exit codes; that one half is empty is no failure."""
    ran = [code for code in codes if code != _NO_TESTS]
    return max(ran, key=abs) if ran else _NO_TESTS


def run(selection: str, arguments: list[str]) -> int:
    """Run both halves of what ``selection``, a marker expression, selects; return an exit code."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tests-") as folder:
        logs = [Path(folder) / half.replace(" ", "-") for half in HALVES]
        processes = []
        for half, log in zip(HALVES, logs, strict=True):
            marks = f"({half}) and ({selection})" if selection else half
            with log.open("w") as stream:
                command = [sys.executable, "-m", "pytest", "-m", marks, *arguments]
                processes.append(subprocess.Popen(command, stdout=stream, stderr=stream))
        try:
            for half, log, process in zip(HALVES, logs, processes, strict=True):
                print(f"== tests: {half}", flush=True)
                with log.open() as written:
                    while process.poll() is None:
                        print(written.read(), end="", flush=True)
                        time.sleep(0.2)
                    print(written.read(), end="", flush=True)
        finally:
            for process in processes:
                process.terminate()
                process.wait()
        last_lines = [(log.read_text().splitlines() or [""])[-1] for log in logs]
    print(summary(last_lines, time.monotonic() - started))
    return exit_code([process.returncode for process in processes])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", default="", dest="selection", help="a marker expression")
    known, rest = parser.parse_known_args()
    sys.exit(run(known.selection, rest))
