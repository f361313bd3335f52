"""``nemo-megacpp checkpoint`` in this process."""

from __future__ import annotations

import sys

import pytest

from nemo_megacpp import cli


def command(*arguments: object) -> int:
    """Run ``nemo-megacpp checkpoint …``; return its exit code."""
    before = sys.argv
    sys.argv = ["nemo-megacpp", "checkpoint", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    assert isinstance(ended.value.code, int)
    return ended.value.code
