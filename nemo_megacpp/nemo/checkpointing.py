"""How a NeMo run saves and loads checkpoints: NeMo's callback and I/O on Megatron-Core 0.16."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import contextlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from nemo.lightning.io.pl import MegatronCheckpointIO, TrainerContext
from nemo.lightning.pytorch.callbacks import ModelCheckpoint
from nemo.lightning.pytorch.strategies.utils import ckpt_to_dir
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO

from nemo_megacpp.checkpoint.backends import fit_to_checkpoint
from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.dcp import require_psutil
from nemo_megacpp.checkpoint.described import actual_layout, actual_model
from nemo_megacpp.checkpoint.folder import is_complete_checkpoint
from nemo_megacpp.checkpoint.lifecycle import (
    begin_checkpoint,
    clear_leftovers,
    finish_checkpoint,
    prune,
    set_damaged_aside,
)
from nemo_megacpp.checkpoint.save_errors import save_errors
from nemo_megacpp.checkpoint.script_state import common_optimizer
from nemo_megacpp.checkpoint.weights import WRAPPER, replace_prefix, validate_tensors
from nemo_megacpp.nemo.actual import tokenizer_of
from nemo_megacpp.printable import cut, say
from nemo_megacpp.runs.events import record_event
from nemo_megacpp.runtime import heartbeat

_logger = logging.getLogger(__name__)
_KEPT = "Earlier checkpoints are unchanged."


class HybridCheckpoint(ModelCheckpoint):
    """NeMo's ``ModelCheckpoint``, whose checkpoints also say their model, layout and data.

    A checkpoint is complete once its manifest is written, after everything else is on the disk.
    Only then is it logged, and older ones are removed.

    Args:
        model_fields: what each checkpoint says of its model, beside what shapes its tensors.
        keep_latest: newest checkpoints to keep; None: all.
        keep_every: checkpoints of multiples of this step are kept as well.
        prints: whether to print a line for each checkpoint that is saved.
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
        """Remove what a crashed run left, before NeMo does: it would remove a complete one too."""
        if trainer.is_global_zero:
            for line in clear_leftovers(Path(str(self.dirpath))):
                say(line)
        super().setup(trainer, *args, **kwargs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set damaged checkpoints aside, now that every rank has loaded the one to resume."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            for line in set_damaged_aside(Path(str(self.dirpath)), trainer.global_step):
                say(line)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save at the interval, and at once when the run has to stop."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if trainer.should_stop:
            self._save_now(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last state of the run, wherever in the interval that is."""
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
        phase = f"the save after step {trainer.global_step}"
        with heartbeat.slow_phase(phase), save_errors(directory, _KEPT):
            self.set_checkpoint_unfinished_marker(filepath)  # clear_leftovers finds it
            if trainer.is_global_zero:
                begin_checkpoint(directory)
                _save_context(trainer, directory)
            super()._save_checkpoint(trainer, filepath)

    def _get_finalize_save_checkpoint_callback(
        self, trainer: pl.Trainer, filepath: str, global_step: int
    ) -> Callable[[], None]:
        """Return what to call when all ranks have written their part: at once, or later."""
        directory = ckpt_to_dir(filepath)
        finish = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)
        config: Any = trainer.lightning_module.config
        identity = {
            "model": actual_model(config, self.model_fields),
            "layout": actual_layout(config, trainer.world_size).short(),
            "tokenizer": tokenizer_of(trainer.datamodule),  # type: ignore[attr-defined]
        }
        arguments = (directory, identity, global_step)

        def finish_in_background() -> None:
            # Reading the checkpoint for its checksums would hold up the training.
            work = _try_to_finish if trainer.is_global_zero else None
            request = AsyncRequest(work, arguments, [finish_now])
            trainer.strategy.checkpoint_io.then(request)  # type: ignore[attr-defined]

        def finish_now() -> None:
            # Where the background process has failed, this raises its error.
            if trainer.is_global_zero and not is_complete_checkpoint(directory):
                finish_checkpoint(*arguments)
            finish()
            if trainer.is_global_zero:
                if self.prints:
                    say(f"step {global_step:>5}  saved {directory}")
                run_dir = directory.parent.parent
                record_event(run_dir, "checkpoint", global_step, path=str(directory))
                self._prune(directory)

        return finish_in_background if self.async_save else finish_now

    def _prune(self, saved: Path) -> None:
        if self.keep_latest is None:
            return
        for path in prune(saved.parent, saved, self.keep_latest, self.keep_every):
            say(f"removed {path}: newer ones are kept (keep_latest={self.keep_latest})")


def _save_context(trainer: pl.Trainer, directory: Path) -> None:
    """Save what NeMo's ``io.load_context`` reads: how model, data and trainer were constructed.

    NeMo does this after it has scheduled a save in the background, which by then may have listed
    the checkpoint's files. Objects of a user that NeMo cannot write down cost the context, as with
    NeMo, and not the checkpoint.
    """
    folder = directory / "context"
    try:
        TrainerContext.from_trainer(trainer).io_dump(folder, yaml_attrs=["model"])
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        _logger.info("%s is saved without NeMo's context: %s", directory, cut(reason, 300))


def _try_to_finish(directory: Path, identity: dict[str, Any], step: int) -> None:
    """Finish a checkpoint in the background process, whose errors nobody receives."""
    with contextlib.suppress(OSError):
        finish_checkpoint(directory, identity, step)


class AcrossBackends(_WrappingCheckpointIO):
    """Loads a checkpoint under the names that it has, whichever program and backend wrote it.

    Args:
        checkpoint_io: loads it.
        new_side_channels: of :func:`fit_to_checkpoint`.

    Raises:
        UserError: on every rank; the checkpoint lacks a tensor of the model, or has others.
    """

    def __init__(self, checkpoint_io: Any, new_side_channels: bool = False):
        super().__init__(checkpoint_io)
        self._new_side_channels = new_side_channels

    def load_checkpoint(
        self, path: Any, sharded_state_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        content, new = CheckpointContent(Path(path)), self._new_side_channels
        replace_prefix(sharded_state_dict, WRAPPER, content.prefix)
        fit_to_checkpoint(sharded_state_dict, content.metadata, new_side_channels=new)
        validate_tensors(sharded_state_dict["state_dict"], content, new_side_channels=new)
        wanted = dict(sharded_state_dict)
        # What the ranks have in common of an optimizer is nested otherwise by other programs.
        optimizers = wanted.pop("optimizer", None)
        if optimizers is not None:
            wanted["optimizer_tensors"] = [optimizer["tensors"] for optimizer in optimizers]
        loaded = self.checkpoint_io.load_checkpoint(path, sharded_state_dict=wanted, **kwargs)
        if optimizers is not None:
            common, found = common_optimizer(loaded["optimizer"]), loaded.pop("optimizer_tensors")
            loaded["optimizer"] = [{**common, "tensors": tensors} for tensors in found]
        return loaded


class AsyncCheckpointIO(AsyncFinalizableCheckpointIO):
    """NeMo's wrapper, which cannot be constructed with Megatron-Core 0.16.

    Its module imports ``strategies.tensorstore``, removed in 0.16, and concludes that
    Megatron-Core is not installed. What the class itself needs is there. One save runs at a time: a
    second waits for the first.

    Args:
        checkpoint_io: writes the checkpoints; constructed with ``async_save=True``.
    """

    def __init__(self, checkpoint_io: MegatronCheckpointIO):
        _WrappingCheckpointIO.__init__(self, checkpoint_io)
        self.async_calls_queue = AsyncCallsQueue()
        self._directory = Path()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Start to save in the background; all ranks call this."""
        self.maybe_finalize_save_checkpoint(blocking=True)
        self._directory = Path(ckpt_to_dir(path))
        super().save_checkpoint(checkpoint, path, storage_options)

    def then(self, request: AsyncRequest) -> None:
        """Schedule another background request after the running ones; all ranks call this."""
        self.async_calls_queue.schedule_async_request(request)

    def maybe_finalize_save_checkpoint(self, blocking: bool = False) -> bool:
        """Finish what has been written; see NeMo's.

        Raises:
            UserError: a save has failed.
        """
        with save_errors(self._directory, _KEPT):
            return super().maybe_finalize_save_checkpoint(blocking)
