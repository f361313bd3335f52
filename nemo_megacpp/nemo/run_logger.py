"""NeMo's logger of a run, which writes into a run folder only while no other run does."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from nemo import lightning as nl

from nemo_megacpp.preflight.outputs import validate_newest
from nemo_megacpp.runs.run_lock import hold_run_to_exit


@dataclass
class RunLogger(nl.NeMoLogger):
    """``NeMoLogger`` that takes the lock of the run folder before anything is written there.

    NeMo calls it first of all that writes, on every rank and however the run was started; global
    rank 0 holds the lock until its process ends, unless the launcher holds it already.

    Args:
        resumed: the checkpoint that the run resumes.
        skipped: damaged ones, newer than that.
        locks: whether to take the lock; false for a folder that no other run can know.

    Raises:
        UserError: another run writes to the folder, or has saved a checkpoint there since this one
            was prepared.
    """

    resumed: Optional[str] = None  # noqa: UP045
    skipped: list[str] = field(default_factory=list)
    locks: bool = True

    def setup(self, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the lock, then set up; see NeMo's."""
        if self.locks and trainer.global_rank == 0:
            assert self.explicit_log_dir is not None
            run_dir = Path(self.explicit_log_dir)
            if hold_run_to_exit(run_dir):
                validate_newest(run_dir, self.resumed, [Path(path) for path in self.skipped])
        return super().setup(trainer, *args, **kwargs)
