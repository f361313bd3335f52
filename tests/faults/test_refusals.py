"""What is refused before a rank starts, and settings that contradict each other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemo_megacpp import cli, start
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import resolve


def test_without_psutil_no_rank_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With it missing, the first save would hang for ever."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(start, "launch", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.setattr(sys, "argv", ["nemo-megacpp", "train", "nam56r_tiny"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("not installed: pip install psutil.\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["keep_latest=0"], "keep_latest: 0 must be at least 1"),
        (["keep_latest=two"], "keep_latest: 'two' is not a whole number"),
        (["keep_latest=2", "keep_every=0"], "keep_every: 0 must be at least 1"),
        (
            ["keep_every=160"],
            "keep_every: 160 exempts checkpoints from keep_latest. Give keep_latest",
        ),
        (
            ["keep_latest=2", "keep_every=100", "save_interval=40"],
            "keep_every: 100 is not a multiple of save_interval=40",
        ),
        (["async_save=maybe"], "async_save: 'maybe' is not true or false"),
    ],
)
def test_bad_settings(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve("nam56r_tiny", overrides)


def test_good_settings() -> None:
    settings = ["async_save=true", "keep_latest=2", "keep_every=120", "save_interval=40"]
    training = resolve("nam56r_tiny", settings).training
    assert (training.async_save, training.keep_latest, training.keep_every) == (True, 2, 120)
    assert resolve("nam56r_tiny").training.keep_latest is None
