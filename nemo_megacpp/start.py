"""Train a recipe: validate everything, then start the ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import yaml

from nemo_megacpp.data.builtin import ensure_builtin
from nemo_megacpp.errors import UserError
from nemo_megacpp.preflight import preflight
from nemo_megacpp.preflight.machine_memory import validate_memory
from nemo_megacpp.preflight.model_checks import validate_recipe_layout
from nemo_megacpp.preflight.outputs import validate_run_dir, validate_shared
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.runs.initial_weights import imported_weights, link_weights
from nemo_megacpp.runs.run_folder import RECIPE_FILE
from nemo_megacpp.runs.run_lock import hold_run, validate_not_running
from nemo_megacpp.runtime.launch import Launched, launch, launched, validate_device_count


@dataclass(frozen=True)
class Door:
    """Through which library a recipe is trained.

    Attributes:
        worker: module of a rank; run as a program, or its ``run_recipe`` where a launcher has
            started the ranks.
        validate: raises a UserError for settings of a recipe that the door does not carry.
    """

    worker: str = "nemo_megacpp.nemo.worker"
    validate: Callable[[Recipe], None] = lambda recipe: None


NEMO = Door()


def train_recipe(recipe: Recipe, dry_run: bool = False, door: Door = NEMO) -> Path:
    """Train a resolved recipe, on this machine or under torchrun.

    Args:
        recipe: resolved.
        dry_run: validate everything, start no rank and write nothing.
        door: through which library.

    Returns:
        The run's folder.

    Raises:
        UserError: anything that is invalid before the ranks start; nothing is written.
        RankFailed: a rank failed later.
    """
    here = launched()
    speaks = here is None or here.rank == 0
    if here is not None:
        recipe = _in_world(recipe, here)
    if speaks and recipe.run_dir is not None:
        validate_not_running(Path(recipe.run_dir))
    door.validate(recipe)
    with imported_weights(recipe) if here is None else contextlib.nullcontext() as imported:
        return _train(recipe, here, imported, door, dry_run)


def _train(
    recipe: Recipe, here: Launched | None, imported: Path | None, door: Door, dry_run: bool
) -> Path:
    """Train from the checkpoint ``imported``, if there is one, instead of ``init_from``."""
    resumes, given = recipe.resume is not None, recipe.init_from
    speaks = here is None or here.rank == 0
    if imported is not None:
        recipe = dataclasses.replace(recipe, init_from=str(imported))
    settled = preflight(recipe, announce=speaks)
    recipe, run_dir = settled.recipe, settled.run_dir
    if here is None:
        validate_device_count(recipe.layout.world)
    validate_memory(recipe, recipe.layout.world if here is None else here.local_world_size)
    if dry_run:
        if speaks:
            print("dry run: everything is valid; nothing was started or written")
        return run_dir
    if here is None and recipe.data is None:
        ensure_builtin(recipe.model["vocab_size"])
    if imported is not None and given is not None:
        recipe = dataclasses.replace(recipe, init_from=str(Path(given).absolute()))
    with hold_run(run_dir) if speaks else contextlib.nullcontext():
        if speaks:
            # Again: another run may have held the folder until now.
            validate_run_dir(run_dir, recipe.resume, resumes, settled.skipped)
            file = _write_recipe(recipe, run_dir)
        if here is not None:
            import_module(door.worker).run_recipe(recipe, run_dir, devices=here.local_world_size)
            return run_dir
        with link_weights(imported, run_dir):
            launch(
                ["-m", door.worker, str(file), str(run_dir), str(os.getpid())],
                recipe.layout.world,
                run_dir / "logs",
            )
    return run_dir


def _write_recipe(recipe: Recipe, run_dir: Path) -> Path:
    file = run_dir / RECIPE_FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(recipe.to_mapping(), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}.") from None
    return file


def _in_world(recipe: Recipe, here: Launched) -> Recipe:
    """Return the recipe on the launcher's ranks; those beyond the layout are data-parallel."""
    if recipe.layout.world_size not in (None, here.world_size):
        raise UserError(
            f"world_size={recipe.layout.world_size}, but the launcher has started "
            f"{here.world_size} ranks. Leave world_size out, or change the launcher's number."
        )
    nodes = here.world_size // here.local_world_size
    validate_shared(recipe.run_dir, nodes)
    layout = dataclasses.replace(recipe.layout, world_size=here.world_size)
    recipe = dataclasses.replace(recipe, layout=layout)
    if nodes > 1:
        validate_recipe_layout(recipe, gpus_per_node=here.local_world_size)
    return recipe
