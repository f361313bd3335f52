"""The benchmark scripts run on a machine without a GPU, and fail where a form is wrong."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

M2RNN = Path(__file__).parents[1] / "benchmarks" / "m2rnn.py"
SMALL = "--device cpu --length 16 --heads 2 --key-dim 4 --value-dim 3 --repeats 1 --threads 1"


def _main(monkeypatch: pytest.MonkeyPatch, arguments: str, **replaced: Any) -> int:
    names = runpy.run_path(str(M2RNN))
    monkeypatch.setattr(sys, "argv", ["m2rnn.py", *arguments.split()])
    names["main"].__globals__.update(replaced)
    status: int = names["main"]()
    return status


def test_m2rnn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(monkeypatch, SMALL) == 0
    printed = capsys.readouterr().out
    assert "torch                       largest relative difference" in printed
    assert "the Triton kernel: it needs a CUDA device" in printed
    assert "eager loop, indexing" in printed and "at most a tenth" in printed


def test_m2rnn_tells_a_wrong_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_megacpp.mixers.kernels.m2rnn_scan import m2rnn_scan

    def unclipped(*tensors: Any, **options: Any) -> Any:
        return m2rnn_scan(*tensors, **options | {"state_gradient_clip": None})

    assert _main(monkeypatch, SMALL, m2rnn_scan=unclipped) == 1
    printed = capsys.readouterr().out
    assert "clip" in printed.splitlines()[0] and "More than 1e-05 from the reference" in printed
