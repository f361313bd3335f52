"""``nemo-megacpp demo``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from nemo_megacpp.nemo.versions import require_nemo


def add_parser(commands: Any) -> None:
    """Add ``demo`` to the command line's parsers."""
    parser = commands.add_parser(
        "demo",
        help="train, stop, and resume the checkpoint in another layout",
        description="Train nam56r_tiny at TP=2, stop, and resume its checkpoint at PP=2.",
    )
    parser.add_argument("--out", default="runs/demo", help="folder to write (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    require_nemo()
    from nemo_megacpp.nemo.resume_demo import demo

    return demo(args.out)
