"""Which checkpoint a run starts from, and whether it fits the run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.folder import (
    NO_STEP,
    find_checkpoint,
    newest_checkpoint,
    run_checkpoints,
    saved_checkpoints,
)
from nemo_megacpp.checkpoint.identity import read_identity, validate_same_model
from nemo_megacpp.checkpoint.manifest import check_manifest
from nemo_megacpp.checkpoint.optimizer_state import validate_optimizer_form
from nemo_megacpp.checkpoint.script_state import is_script_form, validate_script_optimizer
from nemo_megacpp.checkpoint.weights import WRAPPER
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe

_PREFIXES = (WRAPPER, "")
"""Of the names of a model's tensors in the checkpoint of a run: through NeMo, through Bridge."""


@dataclass(frozen=True)
class Newest:
    """The checkpoint of a run that will be resumed.

    Attributes:
        path: its folder; None where the run has none.
        verified: what was verified; None where that is another process's work.
        skipped: newer ones, which are damaged.
        lines: what to say about those.
    """

    path: Path | None
    verified: str | None = None
    skipped: tuple[Path, ...] = ()
    lines: tuple[str, ...] = ()


def choose_newest(recipe: Recipe, decides: bool = True) -> Newest | None:
    """Return the checkpoint that ``resume=auto`` or ``resume=RUN`` means; None for other recipes.

    Args:
        recipe: resolved.
        decides: whether this process reads the contents, and so decides for the job. The other
            ranks look at names and sizes only, and load what rank 0 has chosen
            (:func:`nemo_megacpp.checkpoint.guard.guard_load`).

    Raises:
        UserError: every checkpoint is damaged, or the newest is and ``damaged_checkpoint=stop``.
    """
    folder = _checkpoints_of(recipe)
    saved = saved_checkpoints(folder) if folder is not None else []
    if folder is None or not saved:
        return None if folder is None or recipe.resume != "auto" else Newest(None)
    if not decides:
        return Newest(newest_checkpoint(folder))
    verify, skipped, told = recipe.training.verify_checkpoint, [], []
    for step, path, damage in reversed(saved):
        try:
            if damage is not None:
                raise UserError(damage)
            verified = check_manifest(path) if verify else "not verified"
        except UserError as error:
            if recipe.training.damaged_checkpoint == "stop":
                raise UserError(
                    f"{error} It is the newest in {folder}. damaged_checkpoint=skip resumes the "
                    f"newest undamaged one instead."
                ) from None
            skipped.append(path)
            told.append(f"WARNING: skipping the checkpoint {path}: {error}")
            continue
        if skipped:
            told.append(f"WARNING: resuming step {step} instead{_lost(saved[-1].step - step)}")
        return Newest(path, verified, tuple(skipped), tuple(told))
    raise UserError(
        f"Every checkpoint in {folder} is damaged. The newest: {told[0].partition(': ')[2]} To "
        f"start anew, choose another run_dir."
    )


def _lost(steps: int) -> str:
    return f"; the {steps} steps after it are lost and repeated" if steps < NO_STEP // 2 else ""


def _checkpoints_of(recipe: Recipe) -> Path | None:
    """Return the folder of the checkpoints of the run that ``resume`` names, if it names a run."""
    if recipe.resume is None:
        return None
    if recipe.resume != "auto":
        return run_checkpoints(Path(recipe.resume))
    if recipe.run_dir is None:
        raise UserError("resume=auto looks in run_dir; give run_dir=FOLDER as well.")
    return Path(recipe.run_dir) / "checkpoints"


def find_resume(
    recipe: Recipe, sources: list[PreparedData], newest: Newest | None = None
) -> Recipe:
    """Return the recipe with ``resume`` or ``init_from`` turned into the path of a checkpoint.

    Where ``resume=auto`` finds a checkpoint, ``init_from`` was used when that run began, and is
    dropped.

    Args:
        recipe: resolved.
        sources: its data, of :func:`nemo_megacpp.preflight.recipe_data.open_data`.
        newest: of :func:`choose_newest`, if ``resume`` names a run.

    Raises:
        UserError: no such checkpoint, one of another model or tokenizer, or one to resume that
            leaves no step to train.
    """
    if recipe.resume not in (None, "auto") and recipe.init_from is not None:
        raise UserError(
            f"resume={recipe.resume} continues a run, and init_from={recipe.init_from} starts "
            f"a new one from weights. Give one of them."
        )
    found = newest.path if newest is not None else None
    if newest is None and recipe.resume is not None:
        found = find_checkpoint(Path(recipe.resume))
    tokenizer = sources[0].tokenizer_fingerprint if sources else None
    model, letters = recipe.model, recipe.pattern.uncut
    if found is not None:
        if newest is None or newest.verified is not None:  # else the deciding process does
            validate_same_model(found, model, letters, tokenizer)
            validate_steps_left(found, recipe.training.max_steps, recipe.training.stop_after)
        return dataclasses.replace(recipe, resume=str(found.absolute()), init_from=None)
    if recipe.init_from is not None:
        found = find_checkpoint(Path(recipe.init_from))
        new = recipe.training.init_side_channels == "any"
        validate_same_model(found, model, letters, tokenizer, new_side_channels=new)
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
    step = CheckpointContent(checkpoint).step if identity is None else identity["step"]
    if step is None:
        return
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


def validate_optimizer_state(checkpoint: Path) -> None:
    """Refuse to resume a checkpoint without optimizer state, as ``import`` writes them, or with
    one that only its own program and layout can load.

    Args:
        checkpoint: to resume.

    Raises:
        UserError: it has another prefix, no optimizer state or one of another form, or cannot be
            read.
    """
    content = CheckpointContent(checkpoint)
    instead = f"Start a new run from its weights with init_from={checkpoint}."
    if content.tensors and not content.optimizer_tensors:
        raise UserError(
            f"{checkpoint} holds weights only, without optimizer state, so it cannot be resumed. "
            f"{instead}"
        )
    if content.tensors and content.prefix not in _PREFIXES:
        raise UserError(
            f"A run cannot resume {checkpoint}: the names of its tensors begin with "
            f"{content.prefix!r}, and those of a run's checkpoint with 'module.' or the model's "
            f"own. It was saved by another program. {instead}"
        )
    if content.tensors and content.identity is None:
        metadata = content.common().get("content_metadata")
        validate_optimizer_form(metadata)
        if is_script_form(metadata):
            validate_script_optimizer(checkpoint, content.tensors)
