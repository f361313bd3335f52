"""What ends a run before its last step: a chosen step, SIGTERM, NaN or Inf."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.io import IOMixin

from nemo_megacpp.runs.events import record_event
from nemo_megacpp.runs.non_finite import non_finite
from nemo_megacpp.runtime import stopping


class StopAfter(pl.Callback, IOMixin):
    """Stop after a step before the end of the schedule, as a job with a time limit would."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step >= self.step:
            trainer.should_stop = True


class StopOnSigterm(pl.Callback, IOMixin):
    """Save and stop after the step in which SIGTERM has reached any rank.

    An evaluation is cut short, as it may take longer than the time that a scheduler leaves.
    NeMo's ``PreemptionCallback`` looks at rank 0 alone, saves only where a ``-last`` checkpoint is
    configured, and ends the process in the middle of its callbacks.

    Args:
        run_dir: the run's folder, which records it.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = Path(run_dir)
        self.stopping = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen again: Lightning has set a handler of its own, which raises before a save."""
        stopping.listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
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
        self.on_train_batch_end(trainer, pl_module)
        if self.stopping:
            raise StopIteration  # which Lightning's loop takes for the end of the data

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the end after the checkpoint is complete, if it is saved in the background too."""
        if self.stopping and trainer.is_global_zero:
            print("stopped by SIGTERM; resume it with resume=auto", flush=True)


class StopOnNonFinite(pl.Callback, IOMixin):
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
