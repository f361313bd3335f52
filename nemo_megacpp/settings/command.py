"""``nemo-megacpp settings``; reading its arguments loads neither torch nor Megatron."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import Any


def _settings(args: Namespace) -> int:
    from rich.console import Console

    from nemo_megacpp.settings.report import print_settings, settings_document

    document = settings_document(args.field)
    if args.json:
        print(json.dumps(document, indent=2))
    else:
        print_settings(Console(), document)
    return 0


def add_parser(commands: Any) -> None:
    """Add ``settings`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "settings",
        help="the verdict on each of Megatron's settings: proved, neutral or refused",
        description="Say of every field of Megatron's TransformerConfig, "
        "DistributedDataParallelConfig and OptimizerConfig whether it may be set, and why.",
    )
    parser.add_argument("field", nargs="?", help="one field, as clip_grad or OptimizerConfig.bf16")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_settings)
