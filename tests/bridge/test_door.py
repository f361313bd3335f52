"""``train --through bridge`` where Bridge is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemo_megacpp import cli
from nemo_megacpp.bridge import versions


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["nemo-megacpp", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_a_closed_door_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(versions, "version", {"megatron-core": "0.16.1"}.__getitem__)
    monkeypatch.setattr(versions, "PackageNotFoundError", KeyError)
    assert _run(monkeypatch, "train", "nam56r_tiny", "--through", "bridge") == 2
    said = capsys.readouterr().err
    assert "megatron-bridge is not installed and megatron-core is 0.16.1" in said
    assert "megatron-bridge 0.6 with megatron-core 0.19" in said
    assert not list(tmp_path.iterdir())
