"""Heartbeats of a run: where its loop stands, for :mod:`nemo_megacpp.runtime.heartbeat`."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from megatron.core.parallel_state import update_pg_timeout

from nemo_megacpp.nemo.recorded import Recorded
from nemo_megacpp.runs.heartbeat_start import start_heartbeats
from nemo_megacpp.runtime import heartbeat


class Heartbeats(pl.Callback, Recorded):
    """End the run when a rank makes no progress, or does not respond.

    Progress is a microbatch, a step, a batch of an evaluation, or the end of a save.

    Args:
        run_dir: the run's folder, whose ``logs/`` get the stacks.
        timeout_minutes: that long without progress or response ends the run.
        init_timeout_minutes: the same up to the first step, and during a save.
    """

    def __init__(self, run_dir: str, timeout_minutes: float, init_timeout_minutes: float):
        self.run_dir = run_dir
        self.timeout_minutes = timeout_minutes
        self.init_timeout_minutes = init_timeout_minutes
        self._trained = self._validated = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start, unless the rank has started with heartbeats, before it joined the job.

        The process groups' own timeouts, which name no rank, are set beyond ours.
        """
        start_heartbeats(Path(self.run_dir), self.timeout_minutes, self.init_timeout_minutes)
        longer = timedelta(minutes=2 * (self.timeout_minutes + self.init_timeout_minutes))
        update_pg_timeout(longer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        done = trainer.global_step
        heartbeat.progress(f"step {done + 1}", slow=not self._trained, steps=done)

    def on_megatron_microbatch_start(self, **event: Any) -> None:
        """NeMo calls this in training and in evaluation, on every pipeline stage."""
        heartbeat.progress()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._trained = True
        heartbeat.progress(slow=False, steps=trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        phase = f"the evaluation after step {trainer.global_step}"
        heartbeat.progress(phase, slow=not self._validated)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._validated = True
        heartbeat.progress(slow=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        heartbeat.progress("the end of the run", slow=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        heartbeat.stop()
