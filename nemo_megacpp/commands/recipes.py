"""``nemo-megacpp recipes``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from nemo_megacpp.commands.arguments import add_recipe, read_recipe


def add_parser(commands: Any) -> None:
    """Add ``recipes`` to the command line's parsers."""
    parser = commands.add_parser(
        "recipes",
        help="list the recipes, or print one as YAML",
        description="List the recipes, or print one as a YAML file, with the given settings.",
    )
    add_recipe(parser, optional=True)
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    if args.recipe is not None:
        import yaml

        print(yaml.safe_dump(read_recipe(args).to_mapping(), sort_keys=False), end="")
        return 0
    from nemo_megacpp.recipes.catalog import CATALOG

    width = max(map(len, CATALOG))
    for name, recipe in CATALOG.items():
        print(f"{name:<{width}}  {recipe.summary}")
    return 0
