"""``measure-machine``: what it measures on ranks is a machine that ``plan`` reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_megacpp.cli import read_arguments
from nemo_megacpp.contract.machine import read_machine_file
from nemo_megacpp.contract.machine_presets import PRESETS
from nemo_megacpp.errors import UserError


def test_one_rank_measures_all_but_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    file = tmp_path / "machine.json"
    args = read_arguments(["measure-machine", "--out", str(file), "--name", "here"])
    assert args.run(args) == 0
    assert "links not measured: one rank" in capsys.readouterr().out
    machine = read_machine_file(file)
    assert machine.name == "here" and machine.gpus_per_node == 1
    assert machine.flops["fp32"] > 1e8 and machine.hbm_bandwidth > 1e7
    assert machine.peak("bf16") == machine.flops["fp32"]
    plan = read_arguments(["plan", "nam56r_tiny", "tp=1", "--machine", str(file), "--json"])
    assert plan.run(plan) == 0
    estimate = json.loads(capsys.readouterr().out)["estimate"]
    assert estimate["machine"]["name"] == "here" and estimate["seconds"] > 0


def test_what_is_wrong_in_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_text('{"name": "x", "gpus_per_node": 0}', encoding="utf-8")
    with pytest.raises(UserError, match="gpus_per_node"):
        read_machine_file(file)
    with pytest.raises(UserError, match=r"\.json file in a folder"):
        args = read_arguments(["measure-machine", "--out", str(tmp_path / "machine.txt")])
        args.run(args)


def test_presets_say_where_their_figures_are_from() -> None:
    for name, machine in PRESETS.items():
        assert machine.name == name and "data sheet" in machine.source
        assert machine.in_node.bandwidth > machine.between_nodes.bandwidth
