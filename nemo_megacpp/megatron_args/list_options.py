"""List the options of a Megatron-LM checkout, for the table that comes with this package.

The argument parser is in ``megatron.training``, which is in Megatron-Core's wheel from 0.18 on
only. So that a recipe can be written as arguments of any release without a checkout, names,
destinations, arities and defaults are stored as data::

    PYTHONPATH=CHECKOUT python -m nemo_megacpp.megatron_args.list_options > options_0.16.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from enum import Enum
from typing import Any


def describe(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """Return each option of ``parser``, by its first long name.

    An entry has ``dest``, ``default``, and either ``const``, the value that the bare option gives,
    or ``nargs`` (None for one word); ``also`` lists its other names.
    """
    table: dict[str, dict[str, Any]] = {}
    for action in parser._actions:
        if action.dest == "help" or not action.option_strings:
            continue
        entry = {"dest": action.dest, "default": _plain(action.default)}
        entry |= {"const": action.const} if action.nargs == 0 else {"nargs": action.nargs}
        name, *others = sorted(action.option_strings, key=lambda text: not text.startswith("--"))
        table[name] = {**entry, "also": others} if others else entry
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    return value if isinstance(value, (bool, int, float, str, list, type(None))) else str(value)


def main() -> None:
    """Print the table of the Megatron-LM that is imported."""
    with contextlib.redirect_stdout(sys.stderr):  # importing it prints
        from megatron.training.arguments import add_megatron_arguments

    table = describe(add_megatron_arguments(argparse.ArgumentParser()))
    lines = (f"{json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table))
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
