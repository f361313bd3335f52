"""``nemo-megacpp recipes``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any


def add_parser(commands: Any) -> None:
    """Add ``recipes`` to the command line's parsers."""
    parser = commands.add_parser(
        "recipes",
        help="list the recipes, or print one as YAML",
        description="List the recipes, or print one as a YAML file to change.",
    )
    parser.add_argument("name", nargs="?", help="the recipe to print")
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    from nemo_megacpp.recipes.catalog import CATALOG

    if args.name is not None:
        import yaml

        from nemo_megacpp.recipes.recipe import resolve

        print(yaml.safe_dump(resolve(args.name).to_mapping(), sort_keys=False), end="")
        return 0
    width = max(map(len, CATALOG))
    for name, recipe in CATALOG.items():
        print(f"{name:<{width}}  {recipe.summary}")
    return 0
