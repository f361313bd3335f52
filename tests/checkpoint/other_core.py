"""Run in the environment of the other Megatron-Core: saves a checkpoint, and resumes one.

    python -m tests.checkpoint.other_core FOLDER SAVED

``SAVED`` is a checkpoint of one step, of this environment's caller. In ``FOLDER`` come a run folder
``theirs`` and ``told.pickle``: what was saved into it, and what ``SAVED`` gave.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from nemo_megacpp.core.releases import imported
from nemo_megacpp.proof.core_run import resume_and_train, train_and_save
from nemo_megacpp.proof.step_result import Carried
from nemo_megacpp.runtime.workers import WorkerPool
from tests.checkpoint.exchange import LOADED_IN, SAVED_IN, SPEC, Told


def main(folder: Path, saved: str) -> None:
    """Save in one layout, and resume in another what the caller saved."""
    with WorkerPool(2) as pool:
        theirs = str(folder / "theirs")
        mine: Carried = pool.run(2, train_and_save, SPEC, SAVED_IN, theirs, 1)[0]
        loaded: Carried = pool.run(2, resume_and_train, SPEC, LOADED_IN, saved, 1)[0]
    with (folder / "told.pickle").open("wb") as stream:
        pickle.dump(Told(imported(), mine, loaded), stream)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
