"""What ``nemo-megacpp ladder`` prints: a table for people, one JSON document for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from nemo_megacpp.proof.case_report import BACKENDS, check_cell, failure_lines, finite
from nemo_megacpp.proof.checks import FLOAT64
from nemo_megacpp.proof.ladder import Ladder, RungResult
from nemo_megacpp.proof.step_spec import Dtype
from nemo_megacpp.render import Cell, Table, Toned, print_table, show_bytes
from nemo_megacpp.runtime.workers import Device

SCHEMA = 1
"""Version of the JSON document. It grows when a key is removed or changes its meaning."""


def ladder_document(
    recipe: str, precision: Dtype, device: Device, ladder: Ladder, results: Sequence[RungResult]
) -> dict[str, Any]:
    """Return the JSON document of a ladder.

    Keys: ``schema`` (:data:`SCHEMA`), ``recipe``, ``precision`` (of the measured steps),
    ``device``, ``backend``, ``passed``, ``stopped_at`` (name of the rung that failed, or null),
    ``left_out`` (texts), ``not_run`` (names) and ``rungs``: ``name``, ``layout``, ``ranks``,
    ``tokens`` (of a row), ``documents``, ``recompute`` (settings), ``passed``, ``checks`` and
    ``diagnosis`` (as ``verify`` has them), ``error``, ``peak_bytes`` (by rank), ``seconds`` and
    ``tokens_per_second``.
    """
    failed = next((result.rung.name for result in results if not result.passed), None)
    return {
        "schema": SCHEMA,
        "recipe": recipe,
        "precision": precision,
        "device": device,
        "backend": BACKENDS[device],
        "passed": failed is None,
        "stopped_at": failed,
        "left_out": list(ladder.left_out),
        "not_run": [rung.name for rung in ladder.rungs[len(results) :]],
        "rungs": [finite(_plain(result)) for result in results],
    }


def _plain(result: RungResult) -> dict[str, Any]:
    rung, case = result.rung, result.case
    checks = [{**dataclasses.asdict(check), "passed": check.passed} for check in case.checks]
    return {
        "name": rung.name,
        "layout": rung.layout.short(),
        "ranks": rung.layout.world,
        "tokens": rung.tokens,
        "documents": list(rung.documents),
        "recompute": {k: v for k, v in rung.model.items() if k.startswith("recompute_")},
        "passed": result.passed,
        "checks": checks,
        "error": case.error,
        "diagnosis": case.diagnosis and dataclasses.asdict(case.diagnosis),
        "peak_bytes": list(result.peaks),
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
    }


def print_ladder(console: Console, ladder: Ladder, results: Sequence[RungResult]) -> None:
    """Print a row for each rung, and why the ladder ended where it did."""
    table = Table(
        (
            *("<rung", "tokens", "<layout", "ranks", "loss", "grads", "step"),
            *("peak memory", "tokens/s", "<"),
        )
    )
    for result in results:
        checks = {check.name: check for check in result.case.checks}
        cells: list[Cell] = [
            check_cell(checks[name]) if name in checks else "-"
            for name in ("forward", "gradients", "step")
        ]
        speed = result.tokens_per_second
        table.add(
            result.rung.name,
            f"{result.rung.tokens:,}",
            result.rung.layout.short(),
            f"{result.rung.layout.world}",
            *cells,
            show_bytes(max(result.peaks)) if result.peaks else "-",
            "-" if speed is None else f"{speed:,.0f}",
            "exact" if result.passed else Toned("failed", "bad"),
        )
    for rung in ladder.rungs[len(results) :]:
        world = f"{rung.layout.world}"
        row = (rung.name, f"{rung.tokens:,}", rung.layout.short(), world)
        table.add(*row, *("-",) * 5, "not run")
    print_table(console, table)
    exact = FLOAT64.tolerances
    console.print(
        f"loss, grads, step: largest relative difference from the same weights and rows on one "
        f"rank, in float64; allowed {exact['forward']:.0e}, {exact['gradients']:.0e}, "
        f"{exact['step']:.0e}. Peak memory: of the fullest rank's tensors."
    )
    for line in ladder.left_out:
        console.print(f"left out: {line}", highlight=False)
    for result in results:
        for line in failure_lines(result.case):
            console.print(f"[red]{line}[/red]")
    if all(result.passed for result in results):
        console.print("every rung gives the numbers of one rank")
    else:
        console.print(f"stopped at the rung {results[-1].rung.name}")
