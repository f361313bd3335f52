"""What a run records and prints: its steps, its starts and ends, and the summary."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import os
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from megatron.core.utils import unwrap_model

from nemo_megacpp.nemo.recorded import Recorded
from nemo_megacpp.nemo.stops import StopEarly
from nemo_megacpp.printable import say
from nemo_megacpp.runs.session import Session


class RunFolderWandbLogger(WandbLogger):
    """``WandbLogger`` with an absolute folder.

    NeMo's logger prefixes the run folder more than once, which changes no absolute path.

    Args:
        save_dir: the run folder; W&B makes ``wandb/`` in it.
        kwargs: of ``WandbLogger``.
    """

    def __init__(self, save_dir: str, **kwargs: Any):
        super().__init__(save_dir=os.path.abspath(save_dir), **kwargs)


def _number(value: Any) -> Optional[float]:  # noqa: UP045
    return None if value is None else float(value)


class RunRecorder(pl.Callback, Recorded):
    """Record a run's steps and events in its folder, log scalars, print progress and a summary.

    Only global rank 0 writes and prints.

    Args:
        run_dir: the run's folder.
        log_interval: steps between progress lines.
        resumed: the checkpoint that the run resumes.
    """

    def __init__(
        self,
        run_dir: str,
        log_interval: int = 10,
        resumed: Optional[str] = None,  # noqa: UP045
    ):
        self.session = Session(Path(run_dir), log_interval, resumed)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.session.before_model()  # the strategy builds the model after this

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data, strategy = trainer.datamodule, trainer.strategy  # type: ignore[attr-defined]
        self.session.start(
            unwrap_model([chunk.module for chunk in strategy.megatron_parallel]),
            pl_module.config,
            data.global_batch_size * data.seq_length,
            step=trainer.global_step,
            max_steps=trainer.max_steps,
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        metrics = trainer.callback_metrics
        line, scalars = self.session.end_step(
            trainer.global_step,
            pl_module.config,
            trainer.optimizers[0].param_groups[0]["lr"],
            loss=_number(metrics.get("reduced_train_loss")),
            grad_norm=_number(metrics.get("grad_norm")),
        )
        for name, value in scalars.items():
            pl_module.log(name, torch.tensor(value), batch_size=1, rank_zero_only=True)
        if line is not None:
            print(line, flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.session.restart_clock()
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(stop, StopEarly) and stop.stopping for stop in callbacks):
            return  # the evaluation was cut short: its loss is that of a part of the data
        loss = _number(trainer.callback_metrics.get("val_loss"))
        if trainer.is_global_zero and loss is not None:
            print(self.session.end_evaluation(trainer.global_step, loss), flush=True)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if trainer.is_global_zero:
            said = self.session.fail(trainer.global_step, exception)
            if said is not None:
                print(said, flush=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the end, and print the summary."""
        if trainer.is_global_zero:
            said = self.session.end(trainer.global_step, trainer.max_steps)
            if said is not None:
                say(said)
