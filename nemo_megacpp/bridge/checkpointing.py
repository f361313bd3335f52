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
from nemo_megacpp.checkpoint.content import CheckpointContent
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
from nemo_megacpp.checkpoint.optimizer_state import (
    content_metadata,
    load_optimizer_state_dict,
    optimizer_sharded_state_dict,
    validate_optimizer_form,
)
from nemo_megacpp.checkpoint.random_state import (
    load_random_state,
    random_state,
    set_random_state,
    sharded_random_state,
)
from nemo_megacpp.checkpoint.safe_pickle import read_metadata
from nemo_megacpp.checkpoint.save_errors import save_errors
from nemo_megacpp.runs.events import record_event
from nemo_megacpp.runtime import heartbeat

_KEPT = "Earlier checkpoints are unchanged."
_TRACKER = "latest_checkpointed_iteration.txt"
_CONFIG = "run_config.yaml"
_PROGRESS = "bridge_progress"
"""Key of what Bridge counts: samples and model FLOPs."""


class HybridCheckpointManager:
    """Bridge's ``CheckpointManager`` (``checkpoint.custom_manager_class``).

    Args:
        checkpoint_config: Bridge's; ``save`` is the folder of the run's checkpoints, ``load`` a
            checkpoint to resume, ``pretrained_checkpoint`` one whose weights a new run starts from.
    """

    def __init__(self, checkpoint_config: CheckpointConfig) -> None:
        require_psutil()
        self.config = checkpoint_config
        self.checkpointing_context: dict[str, Any] = {}
        self._saved: int | None = None

    def save(self, ctx: CheckpointSaveContext, callback_manager: CallbackManager | None) -> None:
        """Save a checkpoint of the step that is done, unless it is saved already."""
        state, step = ctx.state, ctx.state.train_state.step
        if self._saved == step:
            return
        folder = Path(str(self.config.save))
        directory = folder / f"iter_{step:07d}"
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
            saved = _training_state(ctx, saving=True)
            dist_checkpointing.save(saved, str(directory), content_metadata=form)
            if torch.distributed.get_rank() == 0:
                self._finish(directory, state)
                mark.unlink()
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
        tracker = directory.parent / _TRACKER
        partial = tracker.with_name(f"{_TRACKER}.partial")
        partial.write_text(str(step), encoding="utf-8")
        os.replace(partial, tracker)
        tell(f"step {step:>5}  saved {directory}")
        record_event(directory.parent.parent, "checkpoint", step, path=str(directory))
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
        model, letters = actual_model(cfg.model, ()), cfg.model.pattern.letters
        tokenizer = tokenizer_fingerprint(cfg.dataset)
        validate_same_model(directory, model, letters, tokenizer, new_side_channels=new)
        weights = find_weights(directory)
        if resumes:
            validate_optimizer_form(dist_checkpointing.load_content_metadata(str(weights)))
        wanted = _training_state(
            ctx, saving=False, prefix=CheckpointContent(directory).prefix, weights_only=not resumes
        )
        fit_to_checkpoint(wanted, read_metadata(weights), new_side_channels=new)
        found = dist_checkpointing.load(wanted, str(weights))
        for index, chunk in enumerate(unwrap_model(ctx.model)):
            loaded = found["model"][f"chunk{index}"]
            prefix = _common_prefix(loaded, chunk)
            own = {name: loaded.get(f"{prefix}{name}") for name in chunk.state_dict()}
            if new:
                own = {name: value for name, value in own.items() if value is not None}
            chunk.load_state_dict(own, strict=not new)
        if not resumes:
            if ctx.optimizer is not None:
                ctx.optimizer.reload_model_params()
            return 0, 0
        return self._resume(ctx, found, directory, weights)

    def _resume(
        self, ctx: CheckpointLoadContext, found: dict[str, Any], directory: Path, weights: Path
    ) -> tuple[int, int]:
        train_state, gbs = ctx.state.train_state, ctx.state.cfg.train.global_batch_size
        assert ctx.optimizer is not None and ctx.opt_param_scheduler is not None
        load_optimizer_state_dict(ctx.optimizer, found["optimizer"])
        step = _step_of(directory)
        train_state.step = step
        train_state.consumed_train_samples = step * gbs
        evaluations = ctx.state.cfg.validation
        done = step // evaluations.eval_interval if evaluations.eval_interval else 0
        train_state.consumed_valid_samples = done * evaluations.eval_iters * gbs
        operations = found.get(_PROGRESS, {}).get("operations", 0.0)
        train_state.floating_point_operations_so_far = operations
        # On the schedule of this run's settings, at the checkpoint's step.
        ctx.opt_param_scheduler.num_steps = 0
        ctx.opt_param_scheduler.step(step * gbs)
        saved = load_random_state(weights)
        if saved is not None:
            set_random_state(saved)
        elif torch.distributed.get_rank() == 0:
            tell("The checkpoint has no random state for this layout: dropout restarts.")
        return step, int(operations)

    def finalize_async_saves(
        self, state: GlobalState, blocking: bool = False, terminate: bool = False
    ) -> None:
        """Do nothing: nothing is saved in the background (``async_save`` is refused)."""


def _step_of(directory: Path) -> int:
    step = CheckpointContent(directory).step
    return 0 if step is None else step


def _training_state(
    ctx: CheckpointSaveContext | CheckpointLoadContext,
    *,
    saving: bool,
    prefix: str = "",
    weights_only: bool = False,
) -> dict[str, Any]:
    """Return the sharded state of this rank.

    Args:
        ctx: Bridge's.
        saving: whether it will be saved, or filled.
        prefix: of the names of the model's tensors.
        weights_only: leave out everything but the model.
    """
    model = {
        f"chunk{index}": chunk.sharded_state_dict(prefix=prefix, metadata=sharding_metadata())
        for index, chunk in enumerate(unwrap_model(ctx.model))
    }
    if weights_only:
        return {"model": model}
    assert ctx.optimizer is not None
    optimizer = optimizer_sharded_state_dict(ctx.optimizer, model, is_loading=not saving)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if isinstance(ctx, CheckpointSaveContext):
        state["random_state"] = sharded_random_state(random_state())
        state[_PROGRESS] = {"operations": float(ctx.num_floating_point_operations_so_far)}
    return state


def _common_prefix(loaded: dict[str, Any], chunk: torch.nn.Module) -> str:
    """Return what the names of ``loaded`` begin with before those of the chunk's state."""
    name = next(iter(chunk.state_dict()))
    return next(key for key in loaded if key.endswith(name)).removesuffix(name)
