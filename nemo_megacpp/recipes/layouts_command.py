"""The arguments of ``nemo-megacpp layouts``; reading them loads neither torch nor NeMo."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from nemo_megacpp.recipes.command_line import add_recipe


def _layouts(args: Namespace) -> int:
    from nemo_megacpp.recipes.layouts import suggest_layouts

    return suggest_layouts(args)


def add_parser(commands: Any) -> None:
    """Add ``layouts`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "layouts",
        help="all legal layouts of a number of ranks, ranked, with pipeline cuts",
        description="Rank every legal layout of a recipe: what fits the GPU first, then by the "
        "bytes that leave a node in a step. Pipelines are cut by work. Needs no GPU.",
    )
    add_recipe(
        parser, overrides="settings to change; a degree, such as tp=8, keeps that axis as it is"
    )
    parser.add_argument("--world-size", metavar="N", help="ranks; default: the recipe's world_size")
    parser.add_argument("--hbm", metavar="141GB", help="memory of a GPU, which layouts must fit")
    parser.add_argument("--gpus-per-node", default="8", metavar="N", help="default: 8")
    parser.add_argument("--top", default="10", metavar="N", help="layouts to show; default: 10")
    parser.add_argument(
        "--kernels", choices=("gpu", "torch"), default="gpu", help="whose activations are counted"
    )
    parser.add_argument("--rejected", action="store_true", help="give every reason of a rejection")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--write", metavar="FILE.yaml", help="write a recipe that 'plan' and 'train' accept"
    )
    parser.add_argument("--pick", metavar="N", help="the rank of the layout to write; default: 1")
    parser.set_defaults(run=_layouts)
