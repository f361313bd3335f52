"""What ``nemo-megacpp verify`` prints: a table for people, one JSON document for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.compare import Rung, RungName
from nemo_megacpp.proof.rounding import MULTIPLE
from nemo_megacpp.proof.trial import Difference, Trial
from nemo_megacpp.render import Cell, Table, Toned, print_table
from nemo_megacpp.runtime.workers import Device

SCHEMA = 1
"""Version of the JSON document; it grows when a key changes its meaning or goes."""

BACKENDS: dict[Device, str] = {"cuda": "nccl", "cpu": "gloo"}
RANKS_ON: dict[Device, str] = {
    "cuda": "ranks on GPUs (nccl); float64 and float32 in plain torch with TF32 off, bfloat16 in "
    "the kernels that training takes here",
    "cpu": "ranks on the CPU (gloo)",
}
_HEADINGS: dict[RungName, str] = {
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
_COUNTS: tuple[RungName, ...] = ("build", "tags", "checkpoint")
_PLURALS: tuple[RungName, ...] = ("tags", "gradients", "replicas")
_DTYPES = {"float64": "f64", "float32": "f32", "bfloat16": "bf16"}


def proof_document(
    recipe: str, layout: ParallelLayout, device: Device, trials: Sequence[Trial]
) -> dict[str, Any]:
    """Return the JSON document of a verification.

    Keys: ``schema`` (:data:`SCHEMA`), ``recipe``, ``layout`` (as text), ``ranks``, ``device``
    (``cuda`` or ``cpu``), ``backend`` (``nccl`` or ``gloo``), ``holds`` (whether all trials do) and
    ``trials``: the fields of :class:`~nemo_megacpp.proof.trial.Trial` and ``holds``, with ``rungs``
    (the fields of :class:`~nemo_megacpp.proof.compare.Rung` and ``holds``) and ``finding`` (the
    fields of :class:`~nemo_megacpp.proof.trial.Finding`, or null). A number that is infinite or
    none at all, because there is nothing to compare it with, is null.
    """
    return {
        "schema": SCHEMA,
        "recipe": recipe,
        "layout": layout.short(),
        "ranks": layout.world,
        "device": device,
        "backend": BACKENDS[device],
        "holds": all(trial.holds for trial in trials),
        "trials": [_plain(trial) for trial in trials],
    }


def _plain(trial: Trial) -> dict[str, Any]:
    plain = dataclasses.asdict(trial)
    for rung, source in zip(plain["rungs"], trial.rungs, strict=True):
        rung["holds"] = source.holds
    return _finite({**plain, "holds": trial.holds})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_trials(console: Console, trials: Sequence[Trial]) -> None:
    """Print the largest relative difference per rung, and what broke first where something did."""
    several = any(trial.kernels != "torch" for trial in trials)
    named = ("model", "layout", "", "kernels") if several else ("model", "layout", "")
    table = Table([f"<{heading}" for heading in (*named, *_HEADINGS.values())])
    for trial in trials:
        cells = {rung.name: rung for rung in trial.rungs}
        table.add(
            trial.model,
            trial.layout if trial.axis == "together" else f"{trial.axis} alone: {trial.layout}",
            _DTYPES[trial.dtype],
            *((trial.kernels,) if several else ()),
            *(_cell(cells[name]) if name in cells else "-" for name in _HEADINGS),
        )
        if any(rung.rounding is not None for rung in trial.rungs):
            blank = ("",) * (len(named) - 2)
            table.add("", "  rounding alone", *blank, *(_rounding(cells[n]) for n in _HEADINGS))
    print_table(console, table)
    console.print(_tolerances(trials))
    for trial in trials:
        for line in _what_broke(trial):
            console.print(f"[red]{line}[/red]")
    if all(trial.holds for trial in trials):
        console.print("all checks passed: the layout does not change the numbers")


def _cell(rung: Rung) -> Cell:
    text = f"{rung.difference:.0f}" if rung.name in _COUNTS else _number(rung.difference)
    return text if rung.holds else Toned(text, "bad")


def _rounding(rung: Rung) -> str:
    return "" if rung.rounding is None else _number(rung.rounding)


def _number(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _tolerances(trials: Sequence[Trial]) -> str:
    limits: dict[str, None] = {}
    for trial in trials:
        for rung in (r for r in trial.rungs if r.tolerance and r.rounding is None):
            limits[f"{trial.dtype} {rung.name} {rung.tolerance:.0e}"] = None
    measured = f"bfloat16 {MULTIPLE:g} times what rounding alone does"
    return f"tolerances: {', '.join(limits)}; {measured}; build, tags, replicas and ckpt 0"


def _what_broke(trial: Trial) -> list[str]:
    where = f"{trial.model} in {trial.layout} ({_DTYPES[trial.dtype]})"
    if trial.error is not None:
        return [f"{where}: {trial.error}"]
    broken = next((rung for rung in trial.rungs if not rung.holds), None)
    if broken is None:
        return []
    verb = "differ" if broken.name in _PLURALS else "differs"
    lines = [f"{where}: {broken.name} {verb} by {_beyond(broken)}"]
    if broken.problem:
        lines = [f"{where}: {broken.name}: {_parameters(broken)}: {broken.problem}"]
    if finding := trial.finding:
        if finding.parameter:
            lines.append(f"  parameter: {finding.parameter}")
        lines.append(f"  first: {_first(finding.first)}")
        lines.append(f"  axis: {finding.axis}")
    return lines


def _parameters(broken: Rung) -> str:
    more = int(broken.difference) - 1
    return f"{broken.where} and {more} more" if more else broken.where


def _first(first: Difference | None) -> str:
    if first is None:
        return "every output, output gradient and parameter gradient agrees"
    place = "" if first.layer is None else f" ({first.family}, layer {first.layer})"
    text = f"the {first.kind} of {first.module}{place} differs by {_beyond(first)}"
    if first.expected is None or first.found is None:
        return text
    return f"{text}: {first.expected:.6g} on one rank, {first.found:.6g} here"


def _beyond(item: Rung | Difference) -> str:
    text = f"{item.difference:.1e}, allowed {item.tolerance:.1e}"
    return text if item.rounding is None else f"{text} (rounding moves it by {item.rounding:.1e})"
