"""``nemo-megacpp train``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nemo_megacpp.commands.arguments import add_recipe, read_recipe

if TYPE_CHECKING:
    from nemo_megacpp.start import Door

_SETTINGS = "settings"
"""Stands for the list of settings, which takes a tenth of a second to import."""


class _Help(argparse.RawDescriptionHelpFormatter):
    def add_text(self, text: str | None) -> None:
        if text == _SETTINGS:
            from nemo_megacpp.recipes.describe import settings_help

            text = settings_help()
        super().add_text(text)


def add_parser(commands: Any) -> None:
    """Add ``train`` to the command line's parsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="train a recipe or a YAML file",
        description="Train a recipe on this machine, or as one of torchrun's ranks.",
        epilog=_SETTINGS,
        formatter_class=_Help,
    )
    add_recipe(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="validate everything, start nothing, write nothing"
    )
    parser.add_argument(
        "--through",
        choices=("nemo", "bridge"),
        help="train with NeMo, or with Megatron-Bridge; without it, with whichever is installed",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    recipe = read_recipe(args)  # a typing error is reported before NeMo's import, which takes long
    from nemo_megacpp.start import train_recipe

    train_recipe(recipe, dry_run=args.dry_run, door=_door(args.through))
    return 0


def _door(through: str | None) -> Door:
    """Return the door that is asked for, or the only one that is open.

    Raises:
        UserError: that door is closed here.
    """
    from nemo_megacpp.bridge import versions as bridge
    from nemo_megacpp.nemo import versions as nemo
    from nemo_megacpp.start import NEMO

    if through is None and nemo.describe_mismatch() and not bridge.describe_mismatch():
        through = "bridge"
    if through == "bridge":
        from nemo_megacpp.bridge.door import BRIDGE

        bridge.require_bridge()
        return BRIDGE
    nemo.require_nemo()
    return NEMO
