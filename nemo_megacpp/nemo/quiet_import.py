"""Importing this module imports NeMo without its warnings on the terminal."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import sys
import tempfile
import warnings

from nemo_megacpp.runtime.imports import importing


def _import_quietly() -> None:
    """Import NeMo; its later messages go to the run's log file."""
    warnings.simplefilter("ignore")
    # A file with a descriptor, for the faulthandler that Megatron's import enables. It stays open,
    # as the libraries' log handlers write to it.
    warned = tempfile.TemporaryFile("w+")  # noqa: SIM115
    try:
        with contextlib.redirect_stderr(warned), importing():
            from nemo.collections import llm  # noqa: F401
    except ImportError:
        warned.seek(0)
        print(warned.read(), file=sys.stderr)
        raise
    faulthandler.enable()  # again, for the real stderr
    quiet_libraries()


def quiet_libraries() -> None:
    """Log only errors of the libraries; Lightning sets its own levels when it is imported."""
    from nemo.utils import logging as nemo_logging

    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
    nemo_logging.setLevel(nemo_logging.ERROR)
    logging.getLogger("nv_one_logger").setLevel(logging.CRITICAL)  # an error ends its spans too


_import_quietly()
