"""What a run through Bridge prints here, and what goes to its log: the libraries' own output."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from nemo_megacpp.printable import printable

LOG = "logs/bridge.log"
"""In the run's folder."""

_terminal = sys.stdout


def keep_library_output(run_dir: Path) -> None:
    """Send what Bridge and Megatron print and log to the run's log from now on.

    Bridge prints its whole configuration, and logs every optional import that fails.
    """
    path = run_dir / LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("a", encoding="utf-8", buffering=1)
    sys.stdout = stream
    logging.basicConfig(stream=stream, level=logging.INFO, force=True)


def tell(text: str) -> None:
    """Print a line on the terminal."""
    print(printable(text), file=_terminal, flush=True)
