"""``nemo-megacpp compare``: one axis at a time, in two recipes or two finished runs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.commands.arguments import print_json, read_count
from nemo_megacpp.commands.plan import add_hardware, read_hardware
from nemo_megacpp.errors import UserError

if TYPE_CHECKING:
    from nemo_megacpp.runs.comparison import Side

_WIDTH = 150
"""Columns of the tables."""


def add_parser(commands: Any) -> None:
    """Add ``compare`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "compare",
        help="what differs between two recipes or two runs, and what one moved axis did",
        description="Sort what differs into axes. If one axis moved, show its effect on memory "
        "and communication and, for runs, on loss, measured memory and speed; if several did, draw "
        "no conclusion.",
    )
    parser.add_argument("a", metavar="A", help="a recipe's name, a YAML file, or a run folder")
    parser.add_argument("b", metavar="B", help="the other one")
    for side in ("a", "b"):
        parser.add_argument(
            f"--in-{side}",
            action="append",
            default=[],
            metavar="key=value",
            help=f"a setting to change in recipe {side.upper()}; may be given again",
        )
    add_hardware(parser)
    parser.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="tp=4,cp=2,…",
        help="a layout that was not run: degrees to change in A's; says why it is illegal, or what "
        "it would hold; may be given again",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the losses of two runs")
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    """Print a comparison, as tables or JSON, and draw it with ``--plot``.

    Returns:
        0.

    Raises:
        UserError: a side that is no recipe and no run, an illegal layout, a bad option.
    """
    from nemo_megacpp.render import make_console
    from nemo_megacpp.runs.comparison import compare_sides, comparison_document, read_side
    from nemo_megacpp.runs.comparison_tables import print_comparison
    from nemo_megacpp.runs.curves import draw_runs
    from nemo_megacpp.runs.untried import judge_layout

    hardware, _ = read_hardware(args)
    if args.world_size is not None:
        read_count("--world-size", args.world_size)
    a = read_side("A", args.a, args.in_a, args.world_size)
    b = read_side("B", args.b, args.in_b, args.world_size)
    if args.plot is not None:
        _validate_plot(Path(args.plot), a, b)
    untried = tuple(judge_layout(a.recipe, degrees, **hardware) for degrees in args.layout)
    comparison = compare_sides(a, b, untried=untried, **hardware)
    if args.json:
        print_json(comparison_document(comparison))
    else:
        print_comparison(make_console(_WIDTH), comparison)
    if args.plot is not None and a.curve is not None and b.curve is not None:
        sides = [(f"A {Path(a.name).name}", a.curve), (f"B {Path(b.name).name}", b.curve)]
        draw_runs(sides, Path(args.plot))
    return 0


def _validate_plot(path: Path, a: Side, b: Side) -> None:
    if a.curve is None or b.curve is None:
        raise UserError("--plot draws the losses of two runs; A and B must be run folders.")
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise UserError(f"--plot {path}: give a file name that ends in .png, in a folder there is.")
