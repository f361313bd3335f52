"""The arguments of ``nemo-megacpp plan``; reading them loads neither torch nor NeMo."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from nemo_megacpp.recipes.command_line import add_recipe


def _plan(args: Namespace) -> int:
    from nemo_megacpp.recipes.plan import plan_recipe

    return plan_recipe(args)


def add_parser(commands: Any) -> None:
    """Add ``plan`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "plan",
        help="what a layout splits, sends, holds and costs, before the run",
        description="Say what a recipe's layout means: legality, who owns what, every collective, "
        "the memory of each stage, and what the layout costs. Needs no GPU.",
    )
    add_recipe(parser)
    parser.add_argument("--world-size", metavar="N", help="ranks; default: the recipe's world_size")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--hbm", metavar="141GB", help="memory of a GPU, to compare with")
    parser.add_argument(
        "--kernels",
        choices=("gpu", "torch"),
        default="gpu",
        help="whose activations: Transformer Engine's and mamba_ssm's, or plain torch's",
    )
    parser.add_argument("--family", metavar="A", help="one family in detail (also embedding, head)")
    parser.add_argument("--stage", type=int, metavar="0", help="one pipeline stage in detail")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--html", metavar="FILE", help="also write a self-contained web page")
    parser.set_defaults(run=_plan)
