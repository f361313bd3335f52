"""Completions that come at the same time stand one after another."""

from __future__ import annotations

import pytest

from nemo_megacpp.inference.transcript import Transcript


def test_the_first_streams_and_the_others_wait(capsys: pytest.CaptureFixture[str]) -> None:
    show = Transcript(["a=", "b=", "c="])
    show(0, "1", False)
    assert capsys.readouterr().out == "--- 1 of 3\na=1"
    show(2, "7", False)
    show(1, "4", True)
    assert capsys.readouterr().out == ""
    show(0, "2", True)
    assert capsys.readouterr().out == "2\n--- 2 of 3\nb=4\n--- 3 of 3\nc=7"
    show(2, "8\x1b", True)
    assert capsys.readouterr().out == "8\\x1b\n"


def test_one_prompt_has_no_heading(capsys: pytest.CaptureFixture[str]) -> None:
    Transcript(["x"])(0, "y", True)
    assert capsys.readouterr().out == "xy\n"
