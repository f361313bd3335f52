"""What ``nemo-megacpp verify`` prints: a table for people, one JSON document for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.case_runner import CaseResult
from nemo_megacpp.proof.checks import MULTIPLE, Check, CheckName
from nemo_megacpp.proof.diagnosis import TensorDifference
from nemo_megacpp.render import Cell, Table, Toned, print_table
from nemo_megacpp.runtime.workers import Device

SCHEMA = 2
"""Version of the JSON document. It grows when a key is removed or changes its meaning."""

BACKENDS: dict[Device, str] = {"cuda": "nccl", "cpu": "gloo"}
RANKS_ON: dict[Device, str] = {
    "cuda": "ranks on GPUs (nccl); float64 and float32 in plain torch with TF32 off, bfloat16 in "
    "the kernels that training uses here",
    "cpu": "ranks on the CPU (gloo)",
}
_HEADINGS: dict[CheckName, str] = {
    "build": "build",
    "tags": "tags",
    "forward": "forward",
    "aux loss": "aux",
    "gradients": "grads",
    "replicas": "replicas",
    "gradient norm": "norm",
    "step": "step",
    "checkpoint": "ckpt",
}
_COUNTS: tuple[CheckName, ...] = ("build", "tags", "checkpoint")
_PLURALS: tuple[CheckName, ...] = ("gradients", "replicas")
_DTYPES = {"float64": "f64", "float32": "f32", "bfloat16": "bf16"}


def verify_document(
    recipe: str, layout: ParallelLayout, device: Device, cases: Sequence[CaseResult]
) -> dict[str, Any]:
    """Return the JSON document of a verification.

    Keys: ``schema`` (:data:`SCHEMA`), ``recipe``, ``layout`` (as text), ``ranks``, ``device``
    (``cuda`` or ``cpu``), ``backend`` (``nccl`` or ``gloo``), ``passed`` (whether all cases did)
    and ``cases``: the fields of :class:`~nemo_megacpp.proof.case_runner.CaseResult` and ``passed``,
    with ``checks`` (the fields of :class:`~nemo_megacpp.proof.checks.Check` and ``passed``) and
    ``diagnosis`` (the fields of :class:`~nemo_megacpp.proof.diagnosis.Diagnosis`, or null). NaN and
    infinity are null.
    """
    plain = []
    for case in cases:
        fields = {**dataclasses.asdict(case), "passed": case.passed}
        for check, source in zip(fields["checks"], case.checks, strict=True):
            check["passed"] = source.passed
        plain.append(finite(fields))
    return {
        "schema": SCHEMA,
        "recipe": recipe,
        "layout": layout.short(),
        "ranks": layout.world,
        "device": device,
        "backend": BACKENDS[device],
        "passed": all(case.passed for case in cases),
        "cases": plain,
    }


def finite(value: Any) -> Any:
    """Return plain data with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_cases(console: Console, cases: Sequence[CaseResult]) -> None:
    """Print the largest relative difference of each check, and a diagnosis of what failed."""
    several = any(case.kernels != "torch" for case in cases)
    named = ("model", "layout", "", "kernels") if several else ("model", "layout", "")
    table = Table([f"<{heading}" for heading in (*named, *_HEADINGS.values())])
    for case in cases:
        checks = {check.name: check for check in case.checks}
        table.add(
            case.model,
            case.layout if case.axis == "together" else f"{case.axis} alone: {case.layout}",
            _DTYPES[case.dtype],
            *((case.kernels,) if several else ()),
            *(check_cell(checks[name]) if name in checks else "-" for name in _HEADINGS),
        )
        if any(check.rounding is not None for check in case.checks):
            blank = ("",) * (len(named) - 2)
            moved = (checks[name].rounding for name in _HEADINGS)
            cells = ("" if rounding is None else _number(rounding) for rounding in moved)
            table.add("", "  rounding alone", *blank, *cells)
    print_table(console, table)
    console.print(_tolerances(cases))
    for case in cases:
        for line in failure_lines(case):
            console.print(f"[red]{line}[/red]")
    if all(case.passed for case in cases):
        console.print("all checks passed: the layout does not change the numbers")


def check_cell(check: Check) -> Cell:
    """Return the difference of a check, marked if it is beyond the tolerance."""
    counted = check.name in _COUNTS
    text = f"{check.difference:.0f}" if counted else _number(check.difference)
    return text if check.passed else Toned(text, "bad")


def _number(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _tolerances(cases: Sequence[CaseResult]) -> str:
    limits = dict.fromkeys(
        f"{case.dtype} {check.name} {check.tolerance:.0e}"
        for case in cases
        for check in case.checks
        if check.tolerance and check.rounding is None
    )
    measured = f"bfloat16 {MULTIPLE:g} times what rounding alone does"
    return f"tolerances: {', '.join(limits)}; {measured}; build, tags, replicas and ckpt 0"


def failure_lines(case: CaseResult) -> list[str]:
    """Return what failed and where it begins; nothing for a case that passed."""
    where = f"{case.model} in {case.layout} ({_DTYPES[case.dtype]})"
    if case.error is not None:
        return [f"{where}: {case.error}"]
    failed = next((check for check in case.checks if not check.passed), None)
    if failed is None:
        return []
    if failed.problem:
        parameter = f"{failed.where}{_more(failed)}: " if failed.where else ""
        lines = [f"{where}: {failed.name}: {parameter}{failed.problem}"]
    elif failed.name in _COUNTS:
        verb = "differ" if failed.difference > 1 else "differs"
        lines = [f"{where}: {failed.name}: {failed.where}{_more(failed)} {verb}"]
    else:
        verb = "differ" if failed.name in _PLURALS else "differs"
        lines = [f"{where}: {failed.name} {verb} by {_beyond(failed)}"]
    if diagnosis := case.diagnosis:
        if diagnosis.parameter:
            lines.append(f"  parameter: {diagnosis.parameter}")
        lines.append(f"  first: {_first(diagnosis.first)}")
        lines.append(f"  axis: {diagnosis.axis}")
    return lines


def _more(check: Check) -> str:
    """Return how many tensors a check counts beyond the one that it names."""
    more = int(check.difference) - 1
    return f" and {more} more" if more else ""


def _first(first: TensorDifference | None) -> str:
    if first is None:
        return "every output, output gradient and parameter gradient agrees"
    place = "" if first.layer is None else f" ({first.family}, layer {first.layer})"
    text = f"the {first.kind} of {first.module}{place} differs by {_beyond(first)}"
    if first.expected is None or first.found is None:
        return text
    return f"{text}: {first.expected:.6g} on one rank, {first.found:.6g} here"


def _beyond(item: Check | TensorDifference) -> str:
    text = f"{item.difference:.1e}, allowed {item.tolerance:.1e}"
    return text if item.rounding is None else f"{text} (rounding moves it by {item.rounding:.1e})"
