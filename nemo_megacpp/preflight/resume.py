"""Which checkpoint a run starts from, and whether it fits the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.folder import find_checkpoint, newest_checkpoint
from nemo_megacpp.checkpoint.identity import read_identity, validate_same_model
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe

_PREFIX = "module."
"""Of the names of a model's tensors in a run's checkpoint."""


def find_resume(recipe: Recipe, sources: list[PreparedData]) -> Recipe:
    """Return the recipe with ``resume`` or ``init_from`` turned into the path of a checkpoint.

    Where ``resume=auto`` finds a checkpoint, ``init_from`` was used when that run began, and is
    dropped.

    Args:
        recipe: resolved.
        sources: its data, of :func:`nemo_megacpp.preflight.recipe_data.open_data`.

    Raises:
        UserError: no such checkpoint, one of another model or tokenizer, or one to resume that
            leaves no step to train.
    """
    found = None
    if recipe.resume == "auto":
        if recipe.run_dir is None:
            raise UserError("resume=auto looks in run_dir; give run_dir=FOLDER as well.")
        found = newest_checkpoint(Path(recipe.run_dir) / "checkpoints")
    elif recipe.resume is not None:
        if recipe.init_from is not None:
            raise UserError(
                f"resume={recipe.resume} continues a run, and init_from={recipe.init_from} starts "
                f"a new one from weights. Give one of them."
            )
        found = find_checkpoint(Path(recipe.resume))
    tokenizer = sources[0].tokenizer_fingerprint if sources else None
    model, letters = recipe.model, recipe.pattern.letters
    if found is not None:
        validate_same_model(found, model, letters, tokenizer)
        validate_steps_left(found, recipe.training.max_steps, recipe.training.stop_after)
        return dataclasses.replace(recipe, resume=str(found.absolute()), init_from=None)
    if recipe.init_from is not None:
        found = find_checkpoint(Path(recipe.init_from))
        validate_same_model(found, model, letters, tokenizer)
        recipe = dataclasses.replace(recipe, init_from=str(found.absolute()))
    return dataclasses.replace(recipe, resume=None)


def validate_steps_left(checkpoint: Path, max_steps: int, stop_after: int | None = None) -> None:
    """Refuse to resume where no step is left to train.

    Args:
        checkpoint: to resume; one that does not say its step is accepted.
        max_steps: of the run, counted from the start of the first one.
        stop_after: of the run.

    Raises:
        UserError: with both numbers.
    """
    identity = read_identity(checkpoint)
    if identity is None:
        return
    step = identity["step"]
    more = "To train on, give a larger max_steps, which counts from the first run's first step."
    if step == max_steps:
        raise UserError(
            f"The run is complete: {checkpoint} is of step {step}, and max_steps={max_steps}. "
            f"{more}"
        )
    if step > max_steps:
        raise UserError(
            f"{checkpoint} is of step {step}, which is past the end of the run, "
            f"max_steps={max_steps}. {more}"
        )
    if stop_after is not None and stop_after <= step:
        raise UserError(
            f"stop_after: {stop_after} is not past step {step} of {checkpoint}, from which the run "
            f"resumes. Give a larger stop_after, or leave it out."
        )


def validate_weights(checkpoint: Path) -> CheckpointContent:
    """Refuse a checkpoint whose tensors do not have the names that a run gives them.

    Raises:
        UserError: with the prefix that they have, or it cannot be read.
    """
    content = CheckpointContent(checkpoint)
    if content.tensors and content.prefix != _PREFIX:
        prefix = repr(content.prefix) if content.prefix else "nothing"
        raise UserError(
            f"A run cannot load {checkpoint}: the names of its tensors begin with {prefix}, and "
            f"those of a run's checkpoint with {_PREFIX!r}. It was saved by another "
            f"program, such as Megatron's own script."
        )
    return content


def validate_optimizer_state(checkpoint: Path) -> None:
    """Refuse to resume a checkpoint without optimizer state, as ``import`` writes them.

    Raises:
        UserError: it has none, or it cannot be read.
    """
    content = validate_weights(checkpoint)
    if content.tensors and not content.optimizer_tensors:
        raise UserError(
            f"{checkpoint} holds weights only, without optimizer state, so it cannot be resumed. "
            f"Start a new run from it with init_from={checkpoint}."
        )
