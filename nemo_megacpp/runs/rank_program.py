"""The program of a rank, the same at every door: ``WORKER RECIPE.yaml RUN_DIR LAUNCHER``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe, resolve
from nemo_megacpp.runs.heartbeat_start import start_heartbeats
from nemo_megacpp.runtime import stopping
from nemo_megacpp.runtime.imports import importing
from nemo_megacpp.runtime.launch import launched
from nemo_megacpp.runtime.orphans import end_with_parent
from nemo_megacpp.runtime.rank_errors import record_failure

RunRecipe = Callable[[Recipe, Path, int], None]
"""Trains a resolved and checked recipe in a run folder, with a number of ranks on this node, as the
rank that the launcher made this process; a door's worker has one."""


def begin_rank(recipe: Recipe, run_dir: Path) -> None:
    """Note SIGTERM from now on, and have the rank's progress watched."""
    stopping.listen()
    training = recipe.training
    if training.heartbeat_timeout_minutes is not None:
        start_heartbeats(run_dir, training.heartbeat_timeout_minutes, training.init_timeout_minutes)


def run_rank(run_recipe: RunRecipe) -> None:
    """Run a rank that our launcher has started, whose process id is ``LAUNCHER``, and exit as the
    launcher expects. Whatever interrupts the training is ``run_recipe``'s to record."""
    end_with_parent(int(sys.argv[3]))
    try:
        record_failure(_run)(run_recipe)
    except UserError:
        sys.exit(2)
    except KeyboardInterrupt:
        if (place := launched()) is not None and place.rank == 0:
            print("Interrupted before training began; nothing is lost.", flush=True)
        sys.exit(128 + signal.SIGINT)


def _run(run_recipe: RunRecipe) -> None:
    place = launched()
    assert place is not None, "a rank is started by a launcher"
    with importing():  # Megatron, for the names of its settings
        recipe = resolve(sys.argv[1])
    run_recipe(recipe, Path(sys.argv[2]), place.local_world_size)
