"""``nemo-megacpp settings``; reading its arguments loads neither torch nor Megatron."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from nemo_megacpp.commands.arguments import print_json

_WIDTH = 100
"""Columns of the tables."""


def add_parser(commands: Any) -> None:
    """Add ``settings`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "settings",
        help="the verdict on each of Megatron's settings: proved, neutral or refused",
        description="List for every field of Megatron's TransformerConfig, "
        "DistributedDataParallelConfig and OptimizerConfig whether it may be set, and why.",
    )
    parser.add_argument("field", nargs="?", help="one field, as clip_grad or OptimizerConfig.bf16")
    parser.add_argument(
        "--cases", action="store_true", help="print the list of cases that vary settings instead"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    from nemo_megacpp.errors import UserError
    from nemo_megacpp.render import make_console
    from nemo_megacpp.settings.verdict_document import print_settings, settings_document

    if args.cases and args.field is not None:
        raise UserError(f"--cases prints the whole list of cases; leave out {args.field!r}.")
    document = _cases() if args.cases else settings_document(args.field)
    if args.json:
        print_json(document)
    elif args.cases:
        _print_cases(make_console(_WIDTH), document)
    else:
        print_settings(make_console(_WIDTH), document)
    return 0


def _cases() -> dict[str, Any]:
    """Return the covering list of the proof."""
    from nemo_megacpp.proof.covering import cases

    return {
        "schema": 1,
        "cases": [
            {
                "axis": case.axis,
                "layout": case.layout.short(),
                "dtype": case.spec.dtype,
                "pattern": case.spec.model["hybrid_pattern"],
                "settings": [setting.name for setting in case.settings],
            }
            for case in cases()
        ],
    }


def _print_cases(console: Any, document: dict[str, Any]) -> None:
    from nemo_megacpp.render import Table, print_table

    rows = document["cases"]
    pairs = {(setting, row["axis"]) for row in rows for setting in row["settings"]}
    settings = {setting for setting, _ in pairs}
    table = Table(
        ("<axis", "<layout", "<dtype", "<pattern", "<settings that are on together"),
        f"{len(rows)} cases, {len(settings)} settings, {len(pairs)} pairs of a setting and an axis",
    )
    for row in rows:
        together = ", ".join(row["settings"])
        table.add(row["axis"], row["layout"], row["dtype"], row["pattern"], together)
    print_table(console, table)
