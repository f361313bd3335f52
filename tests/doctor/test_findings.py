"""The doctor: what it finds here, what it would find elsewhere, and its exit code."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_megacpp.cli import build_parser
from nemo_megacpp.doctor import fit, machine
from nemo_megacpp.doctor.machine import Finding, package_findings
from nemo_megacpp.recipes.recipe import resolve

_GB = 2**30


def _doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    args = build_parser().parse_args(["doctor", *arguments])
    code = args.run(args)
    out = capsys.readouterr().out
    return code, json.loads(out) if "--json" in arguments else out


def _by_part(findings: Any) -> dict[str, Finding]:
    return {finding.part: finding for finding in findings}


def test_this_machine_can_train(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code, document = _doctor(capsys, "nam56r_tiny", "--json")
    found = {finding["part"]: finding for finding in document["findings"]}
    assert (code, document["usable"]) == (0, True), document
    assert found["torch"]["found"] == version("torch")
    assert found["megatron-core"]["status"] == found["NeMo entry point"]["status"] == "ok"
    assert found["layout"]["found"].startswith("TP=2 SP")
    assert found["model"]["found"] == "12 layers: 3 A, 3 M, 5 E, 1 R"
    assert found["data"]["found"] == "built-in, prepared on first use"
    assert str(tmp_path) in found["disk"]["found"]
    assert not any(tmp_path.iterdir()), "a check writes nothing"


def test_a_recipe_that_cannot_be_trained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code, text = _doctor(capsys, "nam56r", "--layout", "tp=3")
    assert code == 1
    assert "num_attention_heads = 56" in " ".join(text.split())
    assert "cannot train until this is fixed: layout, model, data" in " ".join(text.split())


@pytest.mark.parametrize(
    ("installed", "part", "status", "cost"),
    [
        ({"torch": None}, "torch", "broken", "nothing runs"),
        (
            {"megatron-core": "0.17.0"},
            "megatron-core",
            "broken",
            "every other: nothing runs",
        ),
        ({"psutil": None}, "psutil", "broken", "hangs forever"),
        ({"nemo-toolkit": "3.0.0"}, "nemo-toolkit", "limited", "not 2.7: no train, no verify"),
        ({"nvidia-modelopt": None}, "nvidia-modelopt", "limited", "hides llm.pretrain"),
        ({"transformer-engine": None}, "transformer-engine", "limited", "no FP8"),
        ({"mamba-ssm": None}, "mamba-ssm", "limited", "M blocks only as mamba3"),
    ],
)
def test_a_missing_part_has_a_price(
    monkeypatch: pytest.MonkeyPatch,
    installed: dict[str, str | None],
    part: str,
    status: str,
    cost: str,
) -> None:
    there = {"megatron-core": "0.16.1", "nemo-toolkit": "2.7.3", **installed}

    def version(name: str) -> str:
        if (found := there.get(name, "1.0")) is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(machine, "version", version)
    findings = _by_part(package_findings(gpus=8))
    assert findings[part].status == status and cost in findings[part].cost
    others = {finding.status for name, finding in findings.items() if name != part}
    assert others == {"ok"}
    without_gpu = _by_part(package_findings(gpus=0))[part]
    if part in ("transformer-engine", "mamba-ssm"):
        assert without_gpu == Finding(part, "not needed without a GPU")


@pytest.mark.parametrize(
    ("error", "part", "status"),
    [
        (ModuleNotFoundError("No module named 'megatron'", name="megatron"), "absent", "limited"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "does not load", "broken"),
        (AttributeError("torch has no y"), "does not load", "broken"),
    ],
)
def test_a_megatron_that_does_not_load_is_broken(
    monkeypatch: pytest.MonkeyPatch, error: Exception, part: str, status: str
) -> None:
    """Its version alone says nothing of that."""

    def find_spec(name: str) -> None:
        raise error

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    found = machine._index_builder()
    assert (found.found, found.status) == (part, status)
    assert status == "limited" or found.cost == f"nothing runs: {error}"


def test_the_table_keeps_its_brackets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", version)
    code, text = _doctor(capsys)
    assert code == 1
    assert "pip install 'nemo_megacpp[core]'" in " ".join(text.split())
    assert "until this is fixed: torch, megatron-core, einops, psutil" in " ".join(text.split())


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight GPUs, four and four behind one switch."""
    device = SimpleNamespace(name="GPU", total_memory=80 * _GB, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: other < 4)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)


@pytest.mark.usefixtures("eight_gpus")
def test_gpus_and_their_domain() -> None:
    found = _by_part(machine.machine_findings(gpus=8))
    assert found["GPUs"] == Finding("GPUs", "8 x GPU, 80 GiB")
    assert found["NVLink domain"].found == "4 of 8 GPUs"
    assert "use tp=4 or less" in found["NVLink domain"].cost
    assert found["NCCL"].status == "broken" and found["gloo"].status == "ok"


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(
    ("overrides", "part", "status", "text"),
    [
        (["tp=8", "etp=1"], "TP in the NVLink domain", "broken", "TP = 8 does not fit the NVLink"),
        (["tp=4"], "TP in the NVLink domain", "ok", "TP=4"),
        (["world=16"], "ranks", "limited", "needs 2 such nodes"),
        (["data=nowhere"], "data", "broken", "'nowhere' does not exist"),
        (["mode=mamba3", "mamba_head_dim=12"], "Mamba-3 kernel", "limited", "a power of two"),
        ([], "M blocks", "broken", "does not run on a GPU without them"),
    ],
)
def test_a_recipe_against_the_machine(
    overrides: list[str],
    part: str,
    status: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit.importlib.util, "find_spec", lambda name: None)
    finding = _by_part(fit.recipe_findings(resolve("nam56r", overrides), gpus=8))[part]
    assert finding.status == status and text in f"{finding.found} {finding.cost}"


def test_little_disk_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * _GB, path=path)
    )
    finding = machine.disk_finding(tmp_path / "not" / "there")
    assert (finding.status, finding.found) == ("limited", f"2 GiB free at {tmp_path}")
