"""One rank of a run: builds NeMo's configuration from a resolved recipe and runs it."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import signal
import sys
import tempfile
import warnings
from pathlib import Path

from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe, resolve
from nemo_megacpp.runtime import stopping
from nemo_megacpp.runtime.imports import importing
from nemo_megacpp.runtime.launch import launched, leave_last_words
from nemo_megacpp.runtime.orphans import end_with_parent


def run_recipe(recipe: Recipe, run_dir: Path, devices: int) -> None:
    """Train ``recipe`` as the rank that the launcher made this process.

    Args:
        recipe: resolved and checked.
        run_dir: where the run writes.
        devices: ranks on this node.
    """
    stopping.listen()
    _import_quietly()
    from nemo_megacpp.runtime.host import ensure_host

    ensure_host(nemo=True)
    import fiddle

    from nemo_megacpp.nemo.build import to_pretrain

    nodes = recipe.layout.world // devices
    fiddle.build(to_pretrain(recipe, run_dir, devices=devices, num_nodes=nodes))()


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
    place = launched()
    if place is None or place.rank == 0:
        ours = logging.getLogger("nemo_megacpp")
        ours.setLevel(logging.INFO)
        ours.addHandler(logging.StreamHandler(sys.stdout))
        ours.propagate = False


def quiet_libraries() -> None:
    """Leave only errors of the libraries' logs; Lightning sets its own levels when imported."""
    from nemo.utils import logging as nemo_logging

    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
    nemo_logging.setLevel(nemo_logging.ERROR)
    logging.getLogger("nv_one_logger").setLevel(logging.CRITICAL)  # an error ends its spans too


def main() -> None:
    """Entry point of a rank: ``worker RECIPE.yaml RUN_DIR``."""
    place = launched()
    assert place is not None, "a rank is started by a launcher"
    end_with_parent()
    try:
        run_recipe(resolve(sys.argv[1]), Path(sys.argv[2]), place.local_world_size)
    except UserError as error:
        leave_last_words(str(error))
        sys.exit(2)
    except KeyboardInterrupt:  # a terminal interrupts the ranks along with their launcher
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
