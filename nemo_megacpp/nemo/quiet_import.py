"""NeMo, imported without its remarks: importing this module imports it."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import sys
import tempfile
import warnings

from nemo_megacpp.runtime.imports import importing


def _import_quietly() -> None:
    """Import NeMo, keeping the terminal for the run: its remarks go to the run's log file."""
    warnings.simplefilter("ignore")
    # A real file: Megatron's import turns on faulthandler, which needs a descriptor. It stays open:
    # the libraries' log handlers keep it.
    remarks = tempfile.TemporaryFile("w+")  # noqa: SIM115
    try:
        with contextlib.redirect_stderr(remarks), importing():
            from nemo.collections import llm  # noqa: F401
    except ImportError:
        remarks.seek(0)
        print(remarks.read(), file=sys.stderr)
        raise
    faulthandler.enable()  # again, on the real stderr
    quiet_libraries()


def quiet_libraries() -> None:
    """Leave only errors of the libraries' logs; Lightning sets its own levels when imported."""
    from nemo.utils import logging as nemo_logging

    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
    nemo_logging.setLevel(nemo_logging.ERROR)
    logging.getLogger("nv_one_logger").setLevel(logging.CRITICAL)  # an error ends its spans too


_import_quietly()
