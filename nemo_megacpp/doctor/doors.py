"""The doors through which this installation trains: NeMo, Megatron's scripts, Megatron-Bridge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

from nemo_megacpp.bridge import versions as bridge
from nemo_megacpp.core.releases import installed
from nemo_megacpp.doctor.machine import Finding, Status
from nemo_megacpp.nemo import versions as nemo

_SCRIPTS = {"0.16": "pretrain_mamba.py", "0.19": "pretrain_hybrid.py"}
"""Series of Megatron-Core -> the script of its tag."""


def door_findings() -> Iterator[Finding]:
    """Yield one finding per door: open, with its versions, or closed, and why.

    A closed door is no fault while another one trains recipes. Where neither NeMo nor Bridge is
    open, both are marked.
    """
    closed = {"NeMo": nemo.describe_mismatch(), "Bridge": bridge.describe_mismatch()}
    none = all(closed.values())
    doors: dict[str, Mapping[str, str | None]] = {"NeMo": nemo.WANTED, "Bridge": bridge.WANTED}
    for name, wanted in doors.items():
        why = closed[name]
        if why is None:
            yield Finding(f"door: {name}", f"open: {_versions(wanted)}")
        else:
            status: Status = "limited" if none else "ok"
            needs = ", ".join(f"{each} {series or ''}".strip() for each, series in wanted.items())
            yield Finding(f"door: {name}", "closed", status, f"{why}; it needs {needs}")
        if name == "NeMo":
            yield _scripts()


def _scripts() -> Finding:
    part, core = "door: scripts", installed()
    if core is None:
        return Finding(part, "closed", "limited", "megatron-core is not installed")
    if core.series not in _SCRIPTS:
        return Finding(part, "closed", "limited", f"megatron-core {core.text} is not supported")
    return Finding(part, f"open: {_SCRIPTS[core.series]} of Megatron-LM core_v{core.text}")


def _versions(wanted: Iterable[str]) -> str:
    found = []
    for name in wanted:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
