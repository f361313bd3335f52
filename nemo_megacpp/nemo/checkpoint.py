"""A run's checkpoints: saved at once or in the background, whole or not at all, kept or removed."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from nemo.lightning.pytorch.callbacks import ModelCheckpoint
from nemo.lightning.pytorch.strategies.utils import ckpt_to_dir

from nemo_megacpp.checkpoint.dcp import require_psutil
from nemo_megacpp.checkpoint.identity import is_whole
from nemo_megacpp.checkpoint.lifecycle import (
    begin_checkpoint,
    clear_leftovers,
    finish_checkpoint,
    prune,
)
from nemo_megacpp.nemo.actual import actual_layout, actual_model, tokenizer_of
from nemo_megacpp.nemo.checkpoint_io import told_as_user_error
from nemo_megacpp.runs.events import record_event


def _try_to_finish(directory: Path, identity: dict[str, Any], step: int) -> None:
    """Finish a checkpoint in a process that has nobody to tell an error to."""
    with contextlib.suppress(OSError):
        finish_checkpoint(directory, identity, step)


class HybridCheckpoint(ModelCheckpoint):
    """NeMo's ``ModelCheckpoint``; each checkpoint also says which model, layout and data it is of.

    A checkpoint counts once its manifest is there, and is announced then: the last thing written,
    after everything else is on the disk. Only then are older ones removed.

    Args:
        model_fields: what each checkpoint says of its model, beside what shapes its tensors.
        keep_latest: newest checkpoints to keep; None: all.
        keep_every: checkpoints of multiples of this step are kept as well.
        prints: whether a line tells of each checkpoint that is saved.
    """

    def __init__(
        self,
        model_fields: list[str],
        keep_latest: Optional[int] = None,  # noqa: UP045
        keep_every: Optional[int] = None,  # noqa: UP045
        prints: bool = True,
        **kwargs: Any,
    ):
        require_psutil()
        super().__init__(**kwargs)
        self.model_fields = model_fields
        self.keep_latest = keep_latest
        self.keep_every = keep_every
        self.prints = prints

    def setup(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Clear away what a crashed run left, before NeMo does: it would take a whole one too."""
        if trainer.is_global_zero:
            for line in clear_leftovers(Path(str(self.dirpath))):
                print(line, flush=True)
        super().setup(trainer, *args, **kwargs)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save at the interval, and at once when the run is asked to stop."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if trainer.should_stop:
            self._save_now(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the state that the run ends with, wherever in the interval that is."""
        self._save_now(trainer)

    def _save_now(self, trainer: pl.Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            name = self._get_metric_interpolated_filepath_name(candidates, trainer)
            self._save_checkpoint(trainer, name)

    def _monitor_candidates(self, trainer: pl.Trainer) -> dict[str, torch.Tensor]:
        # NeMo logs the number of the step before; a checkpoint is named by the steps it holds.
        return {**super()._monitor_candidates(trainer), "step": torch.tensor(trainer.global_step)}

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        directory = ckpt_to_dir(filepath)
        with told_as_user_error(directory):
            self.set_checkpoint_unfinished_marker(filepath)  # by which a crash is told later
            if trainer.is_global_zero:
                begin_checkpoint(directory)
            super()._save_checkpoint(trainer, filepath)

    def _get_finalize_save_checkpoint_callback(
        self, trainer: pl.Trainer, filepath: str, global_step: int
    ) -> Callable[[], None]:
        """Return what follows when all ranks have written their part: at once, or later."""
        directory = ckpt_to_dir(filepath)
        finish = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)
        arguments = (directory, self._identity(trainer), global_step)

        def finish_in_background() -> None:
            # Reading the checkpoint for its checksums would hold up the training.
            work = _try_to_finish if trainer.is_global_zero else None
            request = AsyncRequest(work, arguments, [make_sure])
            trainer.strategy.checkpoint_io.then(request)  # type: ignore[attr-defined]

        def make_sure() -> None:
            # Where the background process has failed, this raises its error.
            if trainer.is_global_zero and not is_whole(directory):
                finish_checkpoint(*arguments)
            announce()

        def finish_now() -> None:
            if trainer.is_global_zero:
                finish_checkpoint(*arguments)
            announce()

        def announce() -> None:
            finish()
            if trainer.is_global_zero:
                if self.prints:
                    print(f"step {global_step:>5}  saved {directory}", flush=True)
                run_dir = directory.parent.parent
                record_event(run_dir, "checkpoint", global_step, path=str(directory))
                self._prune(directory)

        return finish_in_background if self.async_save else finish_now

    def _identity(self, trainer: pl.Trainer) -> dict[str, Any]:
        config: Any = trainer.lightning_module.config
        return {
            "model": actual_model(config, self.model_fields),
            "layout": actual_layout(config, trainer.world_size).short(),
            "tokenizer": tokenizer_of(trainer.datamodule),  # type: ignore[attr-defined]
        }

    def _prune(self, saved: Path) -> None:
        if self.keep_latest is None:
            return
        for path in prune(saved.parent, saved, self.keep_latest, self.keep_every):
            print(
                f"removed {path}: newer ones are kept (keep_latest={self.keep_latest})", flush=True
            )
