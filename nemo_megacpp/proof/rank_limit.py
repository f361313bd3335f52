"""How many ranks a proof starts on one machine."""

from __future__ import annotations

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout

MAX_RANKS = 16


def validate_ranks(layout: ParallelLayout, command: str, found: str) -> None:
    """Refuse a layout of more ranks than this machine should start.

    Args:
        layout: to run.
        command: the subcommand, such as ``verify``.
        found: what it finds out, as the subject of a sentence.

    Raises:
        UserError: with both numbers.
    """
    if layout.world > MAX_RANKS:
        raise UserError(
            f"The layout needs {layout.world} ranks; {command} starts at most {MAX_RANKS} here. "
            f"Give a smaller one with --layout: {found} depends on which axes are split, not on "
            f"their sizes."
        )
