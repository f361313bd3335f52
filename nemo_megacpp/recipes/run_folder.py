"""Where a run writes, and what it keeps there."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path

from nemo_megacpp.errors import UserError

# In a folder of their own: NeMo moves the files that it finds in a run folder out of the way.
RECORD = "record"
RECIPE_FILE = f"{RECORD}/recipe.yaml"
METRICS_FILE = f"{RECORD}/metrics.jsonl"
EVENTS_FILE = f"{RECORD}/events.jsonl"

_calls = itertools.count(1)


def refuse_unshared(run_dir: str | None, nodes: int) -> None:
    """Refuse to let each node of a job choose a folder.

    Raises:
        UserError: several nodes, and no folder that all of them write.
    """
    if nodes > 1 and run_dir is None:
        raise UserError(
            f"A run on {nodes} nodes needs run_dir=FOLDER, a folder that all nodes see: each node "
            f"would choose one of its own."
        )


def new_run_dir(name: str, started_by_parent: bool) -> str:
    """Return a new folder's name, the same in every rank of a job on this machine.

    Each rank resolves the recipe for itself. What they have in common is the process that started
    them, so the name carries the time at which that process began.

    Args:
        name: of the recipe.
        started_by_parent: whether a launcher started this process as a rank; else the process
            itself is the one that started the others.
    """
    import psutil

    process = psutil.Process()
    if started_by_parent:
        process = process.parent() or process
    stamp = datetime.datetime.fromtimestamp(process.create_time()).strftime("%Y%m%d-%H%M%S")
    call = next(_calls)
    return str(Path("runs") / f"{name}-{stamp}{'' if call == 1 else f'-{call}'}")
