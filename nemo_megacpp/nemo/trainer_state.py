"""What Lightning resumes beside weights and optimizer, for a checkpoint that another door saved."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl

_COUNTED = ("batch_progress", "scheduler_progress", "automatic_optimization.optim_progress")
"""Counters of the loop over an epoch, each of which a step has raised by one."""


def trainer_state(trainer: pl.Trainer, step: int, consumed_samples: int) -> dict[str, Any]:
    """Return the entries of a Lightning checkpoint that say where a run stands.

    Args:
        trainer: that will resume; it has not trained yet.
        step: optimizer steps that are complete.
        consumed_samples: rows that they read.
    """
    loop = copy.deepcopy(trainer.fit_loop.state_dict())
    for name in _COUNTED:
        _count(loop[f"epoch_loop.{name}"], step)
    for counts in loop["epoch_progress"].values():
        counts.update(ready=1, started=1)  # amid the first epoch
    return {
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": pl.__version__,
        "loops": {"fit_loop": loop},
        "lr_schedulers": [{"num_steps": step}],
        "optimizer_states": {},
        "callbacks": {},
        type(trainer.datamodule).__qualname__: {  # type: ignore[attr-defined]
            "consumed_samples": consumed_samples
        },
    }


def _count(progress: dict[str, Any], step: int) -> None:
    """Set every counter of a loop's progress, however deep it lies, except those of ``zero_grad``,
    which Megatron's optimizer does itself."""
    for name, value in progress.items():
        if isinstance(value, dict):
            if name != "zero_grad":
                _count(value, step)
        elif name != "is_last_batch":
            progress[name] = step
