"""What a run resumes: which checkpoint, whether it fits, and whether a step is left to train."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.identity import (
    newest_checkpoint,
    read_identity,
    validate_same_model,
)
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe


def find_resume(recipe: Recipe, sources: list[PreparedData]) -> Recipe:
    """Return the recipe with ``resume`` turned into the path of a checkpoint that fits.

    Args:
        recipe: resolved.
        sources: its data, of :func:`nemo_megacpp.preflight.recipe_data.open_data`.

    Raises:
        UserError: no such checkpoint, one of another model or tokenizer, or one that leaves no step
            to train.
    """
    if recipe.resume is None:
        return recipe
    if recipe.resume == "auto":
        if recipe.run_dir is None:
            raise UserError("resume=auto looks in run_dir; give run_dir=FOLDER as well.")
        found = newest_checkpoint(Path(recipe.run_dir) / "checkpoints")
        if found is None:
            return dataclasses.replace(recipe, resume=None)
    else:
        found = _checkpoint_at(Path(recipe.resume))
    validate_same_model(
        found,
        recipe.model,
        recipe.pattern.letters,
        sources[0].tokenizer_fingerprint if sources else None,
    )
    identity = read_identity(found) or {}
    training = recipe.training
    validate_steps_left(found, identity.get("step"), training.max_steps, training.stop_after)
    return dataclasses.replace(recipe, resume=str(found.absolute()))


def _checkpoint_at(path: Path) -> Path:
    """Accept a checkpoint, or a run folder, whose newest checkpoint is meant."""
    if (path / "weights").is_dir():
        if not (path / "weights" / ".metadata").exists():
            raise UserError(
                f"The checkpoint {path} is incomplete: its run ended while it was being saved "
                f"(weights/.metadata is missing)."
            )
        return path
    for folder in (path / "checkpoints", path):
        if (found := newest_checkpoint(folder)) is not None:
            return found
    raise UserError(
        f"There is no checkpoint at {path}: it is neither a checkpoint folder (with weights/ in "
        f"it) nor a run folder (with a complete one under checkpoints/)."
    )


def validate_steps_left(
    checkpoint: Path, step: int | None, max_steps: int, stop_after: int | None = None
) -> None:
    """Refuse to resume where no step is left to train.

    Args:
        checkpoint: to resume from, for the message.
        step: of the checkpoint; None where it does not say.
        max_steps: of the run, counted from the start of the first one.
        stop_after: of the run.

    Raises:
        UserError: with both numbers.
    """
    if step is None:
        return
    if step == max_steps:
        raise UserError(
            f"The run is complete: {checkpoint} is of step {step}, and max_steps={max_steps}. To "
            f"train on, give a larger max_steps, which counts from the first step of all."
        )
    if step > max_steps:
        raise UserError(
            f"{checkpoint} is of step {step}, which is past the end of the run, max_steps="
            f"{max_steps}. To train on, give a larger max_steps, which counts from the first step "
            f"of all."
        )
    if stop_after is not None and stop_after <= step:
        raise UserError(
            f"stop_after: {stop_after} is not past step {step}, from which {checkpoint} goes on. "
            f"Give a larger stop_after, or leave it out."
        )


def validate_optimizer_state(checkpoint: Path) -> None:
    """Refuse to resume from a checkpoint that has no optimizer state, as ``import`` makes them.

    Raises:
        UserError: it has none, or it cannot be read.
    """
    content = CheckpointContent(checkpoint)
    if content.tensors and not content.optimizer_tensors:
        raise UserError(
            f"{checkpoint} holds weights only, without optimizer state, so it cannot be resumed. "
            f"Resume a checkpoint that a run has saved."
        )
