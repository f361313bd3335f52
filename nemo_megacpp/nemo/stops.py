"""What ends a run before its last step: a chosen step, SIGTERM, NaN or Inf."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import math
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch

from nemo_megacpp.nemo.recorded import Recorded
from nemo_megacpp.runs.events import record_event
from nemo_megacpp.runs.non_finite import non_finite
from nemo_megacpp.runtime import stopping


class StopEarly(pl.Callback, Recorded):
    """Save and stop before the end of the schedule: after a chosen step, as a job with a time limit
    would, or after the step in which SIGTERM has reached any rank.

    On SIGTERM an evaluation is cut short, as it may take longer than the time that a scheduler
    leaves. NeMo's ``PreemptionCallback`` looks at rank 0 alone, saves only where a ``-last``
    checkpoint is configured, and ends the process in the middle of its callbacks.

    Args:
        run_dir: the run's folder, which records a SIGTERM.
        stop_after: the chosen step; None: the schedule's last.

    Attributes:
        stopping: SIGTERM has reached a rank.
    """

    def __init__(self, run_dir: str, stop_after: Optional[int] = None) -> None:  # noqa: UP045
        self.run_dir = Path(run_dir)
        self.stop_after = stop_after
        self.stopping = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen again: Lightning has set a handler of its own, which raises before a save."""
        stopping.listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self.stop_after is not None and trainer.global_step >= self.stop_after:
            trainer.should_stop = True
        self._stop_on_sigterm(trainer)

    def _stop_on_sigterm(self, trainer: pl.Trainer) -> None:
        here = torch.tensor(int(stopping.stop_asked()), device=torch.cuda.current_device())
        torch.distributed.all_reduce(here, torch.distributed.ReduceOp.MAX)
        if not here.item():
            return
        self.stopping = trainer.should_stop = True
        trainer.limit_val_batches = 0  # Lightning would evaluate before it stops
        if trainer.is_global_zero:
            print(f"step {trainer.global_step:>5}  SIGTERM: saving, then stopping", flush=True)
            record_event(self.run_dir, "sigterm", trainer.global_step)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._stop_on_sigterm(trainer)
        if self.stopping:
            raise StopIteration  # which Lightning's loop takes for the end of the data

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the end after the checkpoint is complete, if it is saved in the background too."""
        if self.stopping and trainer.is_global_zero:
            print("stopped by SIGTERM; resume it with resume=auto", flush=True)


class StopOnNonFinite(pl.Callback, Recorded):
    """Stop with an error, before anything is saved, when loss or gradient norm is NaN or Inf.

    A gradient that is not finite before it is reduced is found earlier, and on its rank: see
    :meth:`nemo_megacpp.nemo.strategy.HybridStrategy.training_step`.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        for name, key in (("loss", "reduced_train_loss"), ("gradient norm", "grad_norm")):
            value = trainer.callback_metrics.get(key)
            if value is not None and not math.isfinite(value):
                raise non_finite(trainer.global_step, f"the {name} is {float(value)}")
