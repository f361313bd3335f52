"""What ``verify`` prints of cases that fail."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from rich.console import Console

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.case_report import print_cases
from nemo_megacpp.proof.case_runner import CaseResult, CaseRunner, TrainingPath
from nemo_megacpp.proof.checks import Check, CheckName
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.runtime.workers import WorkerError


def _printed(failed: Check) -> str:
    """Print a case in which one check fails."""
    names = get_args(CheckName)
    checks = tuple(failed if name == failed.name else Check(name, 0.0, 0.0) for name in names)
    output = io.StringIO()
    cases = [CaseResult("all", "TP", "tp=2", "float64", checks)]
    print_cases(Console(file=output, width=200), cases)
    return output.getvalue()


@pytest.mark.parametrize(
    ("check", "line"),
    [
        (Check("forward", 2e-3, 1e-11), "forward differs by 2.0e-03, allowed 1.0e-11"),
        (Check("gradients", 2e-3, 1e-9), "gradients differ by 2.0e-03, allowed 1.0e-09"),
        (
            Check("step", 2e-3, 1e-3, rounding=3e-4),
            "step differs by 2.0e-03, allowed 1.0e-03 (rounding moves it by 3.0e-04)",
        ),
        (Check("build", 1.0, 0.0, "a.weight"), "build: a.weight differs"),
        (Check("checkpoint", 3.0, 0.0, "a.weight"), "checkpoint: a.weight and 2 more differ"),
        (Check("checkpoint", float("inf"), 0.0, problem="KeyError: 1"), "checkpoint: KeyError: 1"),
        (Check("tags", 2.0, 0.0, "a", problem="wrong; fix"), "tags: a and 1 more: wrong; fix"),
    ],
)
def test_a_failed_check_is_one_line(check: Check, line: str) -> None:
    assert f"all in tp=2 (f64): {line}\n" in _printed(check)


def test_an_exception_of_a_rank_is_the_error_of_its_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = TrainingPath(*[lambda *_: None] * 3)
    pool = SimpleNamespace(device="cpu")
    runner = CaseRunner(pool, path, tmp_path, tiny_model("A"))  # type: ignore[arg-type]

    def fail(*_: object) -> None:
        frame = f'  File "{tmp_path}/family.py", line 2, in forward'
        raise WorkerError(f"rank 0: Traceback (most recent call last):\n{frame}\nKeyError: 'bias'")

    monkeypatch.setattr(runner, "_reference_step", fail)
    case = runner.run("all", "TP", ParallelLayout.parse("tp=2"), "float32")
    assert case.error == f"KeyError: 'bias' ({tmp_path}/family.py, line 2, in forward)"
    assert not case.passed
