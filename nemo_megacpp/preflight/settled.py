"""Preflight: everything that is validated before a run starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from nemo_megacpp.checkpoint.dcp import require_psutil
from nemo_megacpp.checkpoint.guard import inspect_before_load
from nemo_megacpp.data.builtin import builtin_folder
from nemo_megacpp.data.checksums import verify_sample
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import validate_all
from nemo_megacpp.layout import ParallelLayout, is_legal
from nemo_megacpp.preflight.model_checks import (
    validate_host,
    validate_model,
    validate_recipe_layout,
)
from nemo_megacpp.preflight.outputs import (
    new_run_dir,
    validate_loggers,
    validate_profile,
    validate_run_dir,
    validate_wandb_login,
)
from nemo_megacpp.preflight.recipe_data import open_data
from nemo_megacpp.preflight.resume import (
    Newest,
    choose_newest,
    find_resume,
    validate_optimizer_state,
)
from nemo_megacpp.preflight.start_weights import validate_start_weights
from nemo_megacpp.printable import say
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.views import shape_of
from nemo_megacpp.runtime.launch import launched


@dataclass(frozen=True)
class Settled:
    """A recipe that can be trained.

    Attributes:
        recipe: with its vocabulary and the checkpoint to resume.
        run_dir: the folder that the run will write.
        skipped: damaged checkpoints, newer than the one to resume.
    """

    recipe: Recipe
    run_dir: Path
    skipped: tuple[Path, ...] = ()


def preflight(recipe: Recipe, announce: bool = True) -> Settled:
    """Validate ``recipe``, choose what it leaves open, and write nothing.

    Args:
        recipe: what to train.
        announce: whether this process prints the choices and verifies the checkpoint to start from
            and a sample of the data, which one process of a job does.

    Raises:
        UserError: for anything that can be found before the ranks start.
    """
    require_psutil()

    def validate_what_is_built() -> None:
        legal = is_legal(recipe.layout, shape_of(recipe))
        # Megatron's checks of an illegal layout would stop at the first violation.
        here = recipe if legal else replace(recipe, layout=ParallelLayout())
        validate_host(here, validate_model(here))

    validate_all(
        lambda: validate_recipe_layout(recipe),
        validate_what_is_built,
        lambda: validate_loggers(recipe),
        lambda: validate_wandb_login(recipe),
        lambda: validate_profile(recipe),
    )
    recipe, sources = open_data(recipe)
    validate_recipe_layout(recipe)  # again, with the vocabulary of the data
    resumes, init_from = recipe.resume is not None, recipe.init_from
    newest = choose_newest(recipe, decides=announce)
    skipped = newest.skipped if newest is not None else ()
    recipe = find_resume(recipe, sources, newest)
    run_dir = Path(recipe.run_dir or new_run_dir(recipe.name, launched() is not None))
    validate_run_dir(run_dir, recipe.resume, resumes, skipped)
    if announce:
        _announce(recipe, run_dir, sources, newest)
        if init_from is not None and recipe.resume is not None:
            say(f"init_from={init_from} was loaded when this run began, and is not loaded again")
    return Settled(recipe, run_dir, skipped)


def _announce(
    recipe: Recipe,
    run_dir: Path,
    sources: list[PreparedData],
    newest: Newest | None,
) -> None:
    start = recipe.resume or recipe.init_from
    if start is not None:
        checkpoint = Path(start)
        known = newest.verified if newest is not None and recipe.resume else None
        verify = recipe.training.verify_checkpoint and known is None
        verified = inspect_before_load(checkpoint, verify=verify)
        if recipe.resume:
            validate_optimizer_state(checkpoint)
        validate_start_weights(checkpoint, recipe)
    of_data = verify_sample(sources) if sources else None
    if recipe.defaults:
        say(f"defaults taken: {'; '.join(recipe.defaults)}")
    say(f"{recipe.name}: {recipe.pattern}")
    say(f"layout: {recipe.layout.describe()}; run folder: {run_dir}")
    if recipe.data is None:
        say(f"built-in corpus: {builtin_folder(recipe.model['vocab_size'])}")
    elif of_data is not None:
        say(of_data)
    if start is not None:
        what = "resuming" if recipe.resume else "starting from the weights of"
        say(f"{what} {start} ({known or verified})")
        for line in newest.lines if newest is not None else ():
            say(line)
