"""The arguments that name a recipe, the same at every command; reading them loads no torch."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from nemo_megacpp.errors import UserError

if TYPE_CHECKING:
    from nemo_megacpp.recipes.recipe import Recipe

MAX_RANKS = 2**20
"""Ranks that a plan counts out into groups."""


def add_recipe(
    parser: ArgumentParser, *, optional: bool = False, overrides: str = "settings to change"
) -> None:
    """Add a recipe, ``key=value`` overrides and ``--layout`` to a command's arguments.

    Args:
        parser: of the command.
        optional: whether the recipe may be left out.
        overrides: the help text of the overrides.
    """
    parser.add_argument(
        "recipe",
        nargs="?" if optional else None,
        help="a recipe's name (see 'recipes') or a YAML file",
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=overrides)
    parser.add_argument(
        "--layout",
        metavar="tp=2,cp=2,…",
        help="degrees to change in the recipe's layout; the same as tp=2 cp=2 among the settings",
    )


def read_recipe(args: Namespace) -> Recipe:
    """Resolve the recipe of arguments that `add_recipe` has defined, and ``--world-size``.

    Raises:
        UserError: as :func:`nemo_megacpp.recipes.recipe.resolve`.
    """
    from nemo_megacpp.recipes.recipe import resolve

    world_size = getattr(args, "world_size", None)
    if world_size is not None:
        read_count("--world-size", world_size)
    return resolve(args.recipe, args.overrides, args.layout, world_size)


def read_count(option: str, text: str, most: int = MAX_RANKS) -> int:
    """Read a number from 1 to ``most``.

    Raises:
        UserError: anything else.
    """
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= most):
        raise UserError(f"{option} {text!r} must be a whole number from 1 to {most:,}.")
    return int(text)
