"""The arguments of ``nemo-megacpp compare``; reading them loads neither torch nor NeMo."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any


def _compare(args: Namespace) -> int:
    from nemo_megacpp.recipes.compare import compare

    return compare(args)


def add_parser(commands: Any) -> None:
    """Add ``compare`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "compare",
        help="what differs between two recipes or two runs, and what one moved axis did",
        description="Sort what differs into axes. If one axis moved, show its effect on memory "
        "and communication and, for runs, on loss and speed; if several did, draw no conclusion.",
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
    parser.add_argument("--world-size", metavar="N", help="ranks, for both recipes")
    parser.add_argument("--gpus-per-node", default="8", metavar="N", help="default: 8")
    parser.add_argument(
        "--kernels", choices=("gpu", "torch"), default="gpu", help="whose activations are counted"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the losses of two runs")
    parser.set_defaults(run=_compare)
