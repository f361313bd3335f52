"""Starts and ends of a run, as events; the summary when it ends."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

from pathlib import Path
from typing import Optional

import lightning.pytorch as pl
import torch
from nemo.lightning.io import IOMixin

from nemo_megacpp.nemo.actual import actual_layout
from nemo_megacpp.runs.events import record_event
from nemo_megacpp.runs.summary import summarize


class EventRecorder(pl.Callback, IOMixin):
    """Record when and how a run starts and ends, and show what came of it.

    Args:
        run_dir: the run's folder; only global rank 0 writes it.
        resumed: the checkpoint that the run resumes.
    """

    def __init__(
        self,
        run_dir: str,
        resumed: Optional[str] = None,  # noqa: UP045
    ):
        self.run_dir = Path(run_dir)
        self.resumed = resumed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        ranks = torch.distributed.get_world_size()
        details = {
            "pattern": str(pl_module.config.pattern),
            "layout": actual_layout(pl_module.config, ranks).describe(),
            "ranks": ranks,
            "max_steps": trainer.max_steps,
        }
        if self.resumed is not None:
            details["checkpoint"] = self.resumed
        kind = "started" if self.resumed is None else "resumed"
        record_event(self.run_dir, kind, trainer.global_step, **details)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if trainer.is_global_zero:
            text = str(exception).strip() or type(exception).__name__
            record_event(self.run_dir, "failed", trainer.global_step, reason=text.splitlines()[0])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the end, and say in a few lines what the run came to."""
        if not trainer.is_global_zero:
            return
        kind = "finished" if trainer.global_step >= trainer.max_steps else "stopped"
        record_event(self.run_dir, kind, trainer.global_step)
        summary = summarize(self.run_dir)
        if summary is None:
            return
        rows = [(kind, str(self.run_dir)), *summary.rows()]
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:<{width}}  {value}" for name, value in rows), flush=True)
