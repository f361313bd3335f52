"""Where a run stands that another program has saved, as Lightning's checkpoint says it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


def progress_of(trainer: pl.Trainer, step: int, samples: int) -> dict[str, Any]:
    """Return what Lightning restores beside weights and optimizer.

    Args:
        trainer: of the run that resumes, not begun.
        step: optimizer steps that are done.
        samples: rows that were trained on.
    """
    loop = trainer.fit_loop.state_dict()
    for name in ("epoch_loop.batch_progress", "epoch_loop.scheduler_progress"):
        _count(loop[name], step)
    _count(loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"], step)
    loop["epoch_loop.state_dict"] = {"_batches_that_stepped": step}
    for counts in loop["epoch_progress"].values():
        counts.update(ready=1, started=1)
    return {
        "pytorch-lightning_version": pl.__version__,
        "epoch": 0,
        "global_step": step,
        "loops": {"fit_loop": loop},
        "lr_schedulers": [{"num_steps": step}],
        "optimizer_states": {},
        type(trainer.datamodule).__qualname__: {"consumed_samples": samples},  # type: ignore[attr-defined]
    }


def _count(progress: dict[str, Any], step: int) -> None:
    for counts in (progress["current"], progress["total"]):
        counts.update(dict.fromkeys(counts, step))
