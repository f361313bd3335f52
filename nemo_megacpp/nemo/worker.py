"""One rank of a run: builds NeMo's configuration from a resolved recipe and runs it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.runs.rank_program import begin_rank, run_rank
from nemo_megacpp.runtime.launch import launched


def run_recipe(recipe: Recipe, run_dir: Path, devices: int) -> None:
    """Train ``recipe`` as the rank that the launcher made this process.

    Args:
        recipe: resolved and checked.
        run_dir: where the run writes.
        devices: ranks on this node.
    """
    begin_rank(recipe, run_dir)
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


if __name__ == "__main__":
    run_rank(run_recipe)
