"""``nemo-megacpp doctor``: check this machine, and a recipe against it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.commands.arguments import add_recipe, print_json, read_recipe
from nemo_megacpp.render import Table, Tone, Toned, make_console, print_table

if TYPE_CHECKING:
    from nemo_megacpp.doctor.machine import Finding

_WIDTH = 110
_TONES: dict[str, Tone] = {"limited": "warning", "broken": "bad"}


def add_parser(commands: Any) -> None:
    """Add the command to the parser of ``nemo-megacpp``."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine, and a recipe against it",
        description="Check versions, kernels, GPUs and disk, and with a recipe its layout and data "
        "against them. Says what each missing part costs. Exit code 1 if nothing can be trained.",
    )
    add_recipe(parser, optional=True)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    findings = list(_findings(args))
    usable = not any(finding.status == "broken" for finding in findings)
    if args.json:
        document = {"usable": usable, "findings": [dataclasses.asdict(f) for f in findings]}
        print_json(document)
    else:
        _print(findings, usable)
    return 0 if usable else 1


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    from nemo_megacpp.doctor.doors import door_findings
    from nemo_megacpp.doctor.machine import (
        Finding,
        count_gpus,
        disk_finding,
        machine_findings,
        package_findings,
    )

    gpus = count_gpus()
    yield from package_findings(gpus)
    yield from door_findings()
    yield from machine_findings(gpus)
    run_dir = "runs"
    if args.recipe is not None:
        try:
            from nemo_megacpp.doctor.fit import recipe_findings

            recipe = read_recipe(args)
        except ImportError as error:
            yield Finding(args.recipe, "not read", "broken", f"needs Megatron-Core: {error}")
        else:
            run_dir = recipe.run_dir or run_dir
            yield from recipe_findings(recipe, gpus)
    yield disk_finding(Path(run_dir))


def _print(findings: list[Finding], usable: bool) -> None:
    table = Table(("<part", "<found", "<", "<what it costs"))
    for finding in findings:
        tone = _TONES.get(finding.status)
        mark = Toned(finding.status, tone) if tone else ""
        table.add(finding.part, finding.found, mark, finding.cost)
    console = make_console(_WIDTH)
    print_table(console, table)
    broken = [finding.part for finding in findings if finding.status == "broken"]
    console.print(
        "[green]ready to train[/green]"
        if usable
        else f"[red]cannot train until this is fixed: {', '.join(broken)}[/red]"
    )
