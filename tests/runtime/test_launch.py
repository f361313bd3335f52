"""Ranks that are interrupted from the terminal."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

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
