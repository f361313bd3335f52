"""How a run through Bridge saves and loads checkpoints: the package's form in Bridge's folders.

::

    checkpoints/
        latest_checkpointed_iteration.txt   the newest, as Megatron's scripts name it
        iter_0000080/                       a distributed checkpoint, with Bridge's run_config.yaml
            nemo_megacpp.json               what it says of its model, layout and data
            manifest.json                   checksums; written last, and then it is complete

The model's tensors have Megatron's names, without a prefix, so Bridge and Megatron's scripts find
them. Optimizer and random state have the package's form, which every layout loads; Bridge's own
loader, which reads that of one layout, does not resume them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.callbacks import CallbackManager
from megatron.bridge.training.checkpointing import CheckpointLoadContext, CheckpointSaveContext
from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.training.state import GlobalState
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model

from nemo_megacpp.bridge.config import tokenizer_fingerprint
from nemo_megacpp.bridge.terminal import tell
from nemo_megacpp.checkpoint.backends import fit_to_checkpoint
from nemo_megacpp.checkpoint.content import CONSUMED, CheckpointContent
from nemo_megacpp.checkpoint.dcp import require_psutil, sharding_metadata
from nemo_megacpp.checkpoint.described import actual_layout, actual_model
from nemo_megacpp.checkpoint.folder import UNFINISHED, find_checkpoint, find_weights
from nemo_megacpp.checkpoint.guard import guard_load
from nemo_megacpp.checkpoint.identity import validate_same_model
from nemo_megacpp.checkpoint.lifecycle import (
    begin_checkpoint,
    clear_leftovers,
    finish_checkpoint,
    prune,
    set_damaged_aside,
)
from nemo_megacpp.checkpoint.optimizer_state import content_metadata, training_sharded_state_dict
from nemo_megacpp.checkpoint.random_state import (
    RandomState,
    load_random_state,
    random_state,
    set_random_state,
    sharded_random_state,
)
from nemo_megacpp.checkpoint.safe_pickle import read_metadata
from nemo_megacpp.checkpoint.save_errors import save_errors
from nemo_megacpp.checkpoint.training_state import load_training_state
from nemo_megacpp.core.checkpoints import TRACKER, iteration_folder, keep_common_file
from nemo_megacpp.runs.events import record_event
from nemo_megacpp.runtime import heartbeat

_KEPT = "Earlier checkpoints are unchanged."
_CONFIG = "run_config.yaml"


class HybridCheckpointManager:
    """Bridge's ``CheckpointManager`` (``checkpoint.custom_manager_class``).

    Args:
        checkpoint_config: Bridge's; ``save`` is the folder of the run's checkpoints, ``load`` a
            checkpoint to resume, ``pretrained_checkpoint`` one whose weights a new run starts from.
    """

    def __init__(self, checkpoint_config: CheckpointConfig) -> None:
        require_psutil()
        self.config = checkpoint_config
        # Bridge looks for files of its own to decide whether there is anything to load, and would
        # train from random weights where it sees none; this is what else it asks.
        self.checkpointing_context: dict[str, Any] = {"local_checkpoint_manager": self}
        self._saved: int | None = None
        self._random_state: RandomState | None = None

    def find_latest(self) -> int:
        """Return 0 if there is a checkpoint to load, else -1: Bridge then calls :meth:`load`."""
        return -1 if self.config.load is None and self.config.pretrained_checkpoint is None else 0

    def save(self, ctx: CheckpointSaveContext, callback_manager: CallbackManager | None) -> None:
        """Save a checkpoint of the step that is done, unless it is saved already."""
        state, step = ctx.state, ctx.state.train_state.step
        if self._saved == step:
            return
        folder = Path(str(self.config.save))
        directory = iteration_folder(folder, step)
        mark = directory.with_name(directory.name + UNFINISHED)
        with (
            heartbeat.slow_phase(f"the save after step {step}"),
            save_errors(directory, _KEPT),
        ):
            if torch.distributed.get_rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                if self._saved is None:
                    self._tidy(folder, step)
                mark.touch()
                begin_checkpoint(directory)
            torch.distributed.barrier()
            form = content_metadata(bool(state.cfg.optimizer.use_distributed_optimizer))
            saved = training_sharded_state_dict(unwrap_model(ctx.model), ctx.optimizer)
            saved["random_state"] = sharded_random_state(random_state())
            saved[CONSUMED] = state.train_state.consumed_train_samples
            dist_checkpointing.save(saved, str(directory), content_metadata=form)
            if torch.distributed.get_rank() == 0:
                keep_common_file(directory)
                self._finish(directory, state)
                mark.unlink()  # only then is it counted among the complete ones
                self._prune(directory, state)
            torch.distributed.barrier()
        self._saved = step

    def _tidy(self, folder: Path, step: int) -> None:
        """Remove what a crashed run left, and set damaged checkpoints aside."""
        resumed = self.config.load
        for line in (
            *clear_leftovers(folder),
            *set_damaged_aside(folder, step if resumed is None else _step_of(Path(resumed))),
        ):
            tell(line)

    def _finish(self, directory: Path, state: GlobalState) -> None:
        step, model = state.train_state.step, state.cfg.model
        state.cfg.to_yaml(str(directory / _CONFIG))
        identity = {
            "model": actual_model(model, model.said),
            "layout": actual_layout(model, torch.distributed.get_world_size()).short(),
            "tokenizer": tokenizer_fingerprint(state.cfg.dataset),
        }
        finish_checkpoint(directory, identity, step)
        tracker = directory.parent / TRACKER
        partial = tracker.with_name(f"{TRACKER}.partial")
        partial.write_text(str(step), encoding="utf-8")
        os.replace(partial, tracker)
        tell(f"step {step:>5}  saved {directory}")
        record_event(directory.parent.parent, "checkpoint", step, path=str(directory))

    def _prune(self, directory: Path, state: GlobalState) -> None:
        model = state.cfg.model
        if (most := model.keep_latest) is not None:
            for path in prune(directory.parent, directory, most, model.keep_every):
                tell(f"removed {path}: newer ones are kept (keep_latest={most})")

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, int]:
        """Resume ``load``, or take the weights of ``pretrained_checkpoint``.

        Returns:
            The steps and the model FLOPs that were done.

        Raises:
            UserError: the checkpoint is damaged, of another model, or its optimizer state has
                another form; nothing is loaded then.
        """
        cfg = ctx.state.cfg
        resumes = self.config.load is not None
        chosen = self.config.load if resumes else self.config.pretrained_checkpoint
        directory = find_checkpoint(guard_load(Path(str(chosen)), verify=False))
        new = not resumes and cfg.model.init_side_channels == "any"
        model, letters = actual_model(cfg.model, ()), cfg.model.pattern.uncut
        tokenizer = tokenizer_fingerprint(cfg.dataset)
        validate_same_model(directory, model, letters, tokenizer, new_side_channels=new)
        if resumes:
            return self._resume(ctx, directory)
        weights = find_weights(directory)
        chunks, prefix = unwrap_model(ctx.model), CheckpointContent(directory).prefix
        wanted = {
            f"chunk{index}": chunk.sharded_state_dict(prefix=prefix, metadata=sharding_metadata())
            for index, chunk in enumerate(chunks)
        }
        fit_to_checkpoint(wanted, read_metadata(weights), new_side_channels=new)
        found = dist_checkpointing.load(wanted, str(weights))
        for index, chunk in enumerate(chunks):
            loaded = found[f"chunk{index}"]
            own = {name: loaded.get(f"{prefix}{name}") for name in chunk.state_dict()}
            chunk.load_state_dict(own, strict=True)
        if ctx.optimizer is not None:
            ctx.optimizer.reload_model_params()
        return 0, 0

    def _resume(self, ctx: CheckpointLoadContext, directory: Path) -> tuple[int, int]:
        """Load everything that a run saved, of this door or NeMo's, in any layout."""
        cfg, train_state = ctx.state.cfg, ctx.state.train_state
        assert ctx.optimizer is not None and ctx.opt_param_scheduler is not None
        load_training_state(unwrap_model(ctx.model), ctx.optimizer, directory)
        step, rows = _step_of(directory), cfg.train.global_batch_size
        consumed = CheckpointContent(directory).consumed_samples
        if consumed is None:
            consumed = step * rows
            if torch.distributed.get_rank() == 0:
                tell(
                    f"The checkpoint does not say how many rows its run has read: resuming after "
                    f"{step} steps of global_batch_size={rows}."
                )
        train_state.step, train_state.consumed_train_samples = step, consumed
        cfg.dataset.rows_to_read = consumed + (cfg.train.train_iters - step) * rows
        train_state.consumed_valid_samples = 0  # every evaluation reads the same rows
        # On the schedule of this run's settings, at the checkpoint's step.
        ctx.opt_param_scheduler.num_steps = 0
        ctx.opt_param_scheduler.step(step * rows)
        self._random_state = load_random_state(find_weights(directory))
        if self._random_state is None and torch.distributed.get_rank() == 0:
            tell("The checkpoint has no random state for this layout: dropout restarts.")
        return step, 0

    def finalize_async_saves(
        self, state: GlobalState, blocking: bool = False, terminate: bool = False
    ) -> None:
        """Set the generators before the first step of a resumed run: the data loaders, which are
        set up after :meth:`load`, draw from them.

        Bridge calls this before every step. Nothing is saved in the background (``async_save`` is
        refused).
        """
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None


def _step_of(directory: Path) -> int:
    step = CheckpointContent(directory).step
    return 0 if step is None else step
