"""Arguments that several commands have; reading them loads no torch."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout.parallel import MAX_RANKS

if TYPE_CHECKING:
    from nemo_megacpp.recipes.recipe import Recipe

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_UNITS |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_LEAST, _MOST = 10**9, 10**12


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
        help="degrees to change in the recipe's layout, as the settings tp=2 cp=2 do",
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


def read_gpu_memory(text: str) -> int:
    """Read the memory of a GPU, such as ``141GB`` or ``80GiB``.

    Raises:
        UserError: not a size with a unit, or not between 1 GB and 1 TB.
    """
    match = _SIZE.fullmatch(text.strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items() if unit not in ("", "B")}
    if match is None or match[2].lower() not in units:
        raise UserError(
            f"{text!r} is not a memory size. Write a number with a unit, for example 80GB (H100), "
            f"141GB (H200) or 192GB (B200); GiB counts in powers of 1024."
        )
    size = round(float(match[1]) * units[match[2].lower()])
    if not _LEAST <= size <= _MOST:
        raise UserError(
            f"{text} is not the memory of a GPU: give that of one rank, between 1GB and 1TB."
        )
    return size


def print_json(document: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(document, indent=1, allow_nan=False))
