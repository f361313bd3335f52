"""``nemo-megacpp train``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from nemo_megacpp.commands.arguments import add_recipe


def add_parser(commands: Any) -> None:
    """Add ``train`` to the command line's parsers."""
    parser = commands.add_parser(
        "train", help="train a recipe or a YAML file", description="Train a recipe."
    )
    add_recipe(parser)
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    from nemo_megacpp.commands.arguments import read_recipe
    from nemo_megacpp.nemo.train import train_recipe

    train_recipe(read_recipe(args))
    return 0
