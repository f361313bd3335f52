"""One rank of a run: builds NeMo's configuration from a resolved recipe and runs it."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe, resolve
from nemo_megacpp.runs.heartbeat_start import start_heartbeats
from nemo_megacpp.runtime import stopping
from nemo_megacpp.runtime.imports import importing
from nemo_megacpp.runtime.launch import launched
from nemo_megacpp.runtime.orphans import end_with_parent
from nemo_megacpp.runtime.rank_errors import record_failure


def run_recipe(recipe: Recipe, run_dir: Path, devices: int) -> None:
    """Train ``recipe`` as the rank that the launcher made this process.

    Args:
        recipe: resolved and checked.
        run_dir: where the run writes.
        devices: ranks on this node.
    """
    stopping.listen()
    training = recipe.training
    if training.heartbeat_timeout_minutes is not None:
        start_heartbeats(run_dir, training.heartbeat_timeout_minutes, training.init_timeout_minutes)
    # Rank 0 prints our log on the terminal; NeMo's goes to the run's log file.
    import nemo_megacpp.nemo.quiet_import  # noqa: F401

    place = launched()
    if place is None or place.rank == 0:
        ours = logging.getLogger("nemo_megacpp")
        ours.setLevel(logging.INFO)
        ours.addHandler(logging.StreamHandler(sys.stdout))
        ours.propagate = False
    from nemo_megacpp.runtime.host import ensure_host

    ensure_host(nemo=True)
    import fiddle

    from nemo_megacpp.nemo.pretrain_task import to_pretrain

    nodes = recipe.layout.world // devices
    fiddle.build(to_pretrain(recipe, run_dir, devices=devices, num_nodes=nodes))()


def main() -> None:
    """Entry point of a rank: ``worker RECIPE.yaml RUN_DIR LAUNCHER``, whose process id that is."""
    end_with_parent(int(sys.argv[3]))
    try:
        record_failure(_run_rank)()
    except UserError:
        sys.exit(2)
    except KeyboardInterrupt:  # during training, RunRecorder answers
        if (place := launched()) is not None and place.rank == 0:
            print("Interrupted before training began; nothing is lost.", flush=True)
        sys.exit(128 + signal.SIGINT)


def _run_rank() -> None:
    place = launched()
    assert place is not None, "a rank is started by a launcher"
    with importing():  # Megatron, for the names of its settings
        recipe = resolve(sys.argv[1])
    run_recipe(recipe, Path(sys.argv[2]), place.local_world_size)


if __name__ == "__main__":
    main()
