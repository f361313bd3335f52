"""Which doors the doctor finds open."""

from __future__ import annotations

import pytest

from nemo_megacpp.bridge import versions as bridge
from nemo_megacpp.doctor import doors
from nemo_megacpp.nemo import versions as nemo


def _findings(
    monkeypatch: pytest.MonkeyPatch, no_nemo: str | None, no_bridge: str | None
) -> dict[str, doors.Finding]:
    monkeypatch.setattr(nemo, "describe_mismatch", lambda: no_nemo)
    monkeypatch.setattr(bridge, "describe_mismatch", lambda: no_bridge)
    return {finding.part: finding for finding in doors.door_findings()}


def test_a_closed_door_is_no_fault_beside_an_open_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _findings(monkeypatch, "nemo-toolkit is not installed", None)
    assert found["door: Bridge"].found.startswith("open: ")
    closed = found["door: NeMo"]
    assert (closed.found, closed.status) == ("closed", "ok")
    assert closed.cost.startswith("nemo-toolkit is not installed; it needs nemo-toolkit 2.7")


def test_without_any_both_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _findings(monkeypatch, "no NeMo", "no Bridge")
    assert {found[f"door: {name}"].status for name in ("NeMo", "Bridge")} == {"limited"}


def test_the_script_is_that_of_the_installed_core(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _findings(monkeypatch, None, "megatron-bridge is not installed")
    assert "pretrain_" in found["door: scripts"].found
