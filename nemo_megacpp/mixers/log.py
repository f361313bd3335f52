"""One line for a choice that was made for the user while a model is built."""

from __future__ import annotations

import logging
from functools import cache


@cache
def log_once(message: str) -> None:
    """Log ``message`` at level INFO of the logger ``nemo_megacpp``, once per process."""
    logging.getLogger("nemo_megacpp").info(message)
