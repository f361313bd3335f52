"""``nemo-megacpp train``: check everything, then start the ranks."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

from nemo_megacpp.checkpoint.guard import inspect_before_load
from nemo_megacpp.checkpoint.identity import newest_checkpoint
from nemo_megacpp.data.builtin import builtin_folder, ensure_builtin
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import refuse_illegal
from nemo_megacpp.recipes.check import (
    check_layout_of,
    check_loggers_of,
    check_model_of,
    find_resume,
    open_data,
    shape_of,
)
from nemo_megacpp.recipes.check_host import check_host_of
from nemo_megacpp.recipes.recipe import Recipe, resolve
from nemo_megacpp.recipes.resume import refuse_weights_alone
from nemo_megacpp.recipes.run_folder import RECIPE_FILE, new_run_dir, refuse_unshared
from nemo_megacpp.runtime.launch import (
    Launched,
    launch,
    launched,
    refuse_too_few_devices,
)


def train(source: str, overrides: Iterable[str] = (), layout: str | None = None) -> Path:
    """Train the recipe that ``source`` names, on this machine or under torchrun.

    Args:
        source: a recipe's name or a YAML file.
        overrides: ``key=value`` strings.
        layout: of ``--layout``, as for :func:`nemo_megacpp.recipes.recipe.resolve`.

    Returns:
        The run's folder.

    Raises:
        UserError: for anything that can be refused before the ranks start; nothing is written.
        RankFailed: if a rank fails later.
    """
    return train_recipe(resolve(source, overrides, layout))


def train_recipe(recipe: Recipe) -> Path:
    """Train a resolved recipe; see :func:`train`."""
    here = launched()
    speaks = here is None or here.rank == 0
    if here is not None:
        recipe = _in_world(recipe, here)
    recipe, run_dir = settle(recipe, announce=speaks)
    if here is not None:
        from nemo_megacpp.recipes.nemo.worker import run_recipe

        if speaks:
            _write_recipe(recipe, run_dir)
        run_recipe(recipe, run_dir, devices=here.local_world_size)
        return run_dir
    refuse_too_few_devices(recipe.layout.world)
    if recipe.data is None:
        vocab_size = recipe.model["vocab_size"]
        ensure_builtin(builtin_folder(vocab_size), vocab_size)
    file = _write_recipe(recipe, run_dir)
    launch(
        ["-m", "nemo_megacpp.recipes.nemo.worker", str(file), str(run_dir)],
        recipe.layout.world,
        run_dir / "logs",
    )
    return run_dir


def _write_recipe(recipe: Recipe, run_dir: Path) -> Path:
    file = run_dir / RECIPE_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe.to_mapping(), sort_keys=False), encoding="utf-8")
    return file


def settle(recipe: Recipe, announce: bool = True) -> tuple[Recipe, Path]:
    """Check ``recipe`` and settle what it leaves open, without writing anything.

    Args:
        recipe: what to train.
        announce: this process speaks for the job: it prints what was settled, and it is the one
            that verifies the checkpoint to go on from, where there is one.

    Returns:
        The recipe with vocabulary and checkpoint settled, and the folder the run will write.
    """
    from nemo_megacpp.checkpoint.dcp import require_psutil

    require_psutil()
    check_layout_of(recipe)
    check_model_of(recipe)
    check_host_of(recipe)
    check_loggers_of(recipe)
    recipe, sources = open_data(recipe)
    goes_on = recipe.resume is not None  # even if resume=auto finds that nothing was saved yet
    recipe = find_resume(recipe, sources)
    run_dir = Path(recipe.run_dir or new_run_dir(recipe.name, launched() is not None))
    _check_run_dir(run_dir)
    if not goes_on and (run_dir / "checkpoints").exists():
        raise UserError(
            f"{run_dir} already holds a run. Go on from it with resume=auto, or choose another "
            f"run_dir."
        )
    newest = newest_checkpoint(run_dir / "checkpoints")
    if newest is not None and newest.resolve() != Path(str(recipe.resume)).resolve():
        raise UserError(
            f"{run_dir} already holds a run, whose newest checkpoint is {newest.name}: a run that "
            f"goes on from {recipe.resume} would come to overwrite it. Go on from the newest with "
            f"resume=auto, or choose another run_dir."
        )
    resumed = None
    if announce and recipe.resume is not None:
        checkpoint = Path(recipe.resume)
        resumed = inspect_before_load(checkpoint, verify=recipe.training.verify_checkpoint)
        refuse_weights_alone(checkpoint)
    if announce:
        if recipe.defaults:
            print(f"defaults taken: {'; '.join(recipe.defaults)}")
        print(f"{recipe.name}: {recipe.pattern}")
        print(f"layout: {recipe.layout.describe()}; run folder: {run_dir}")
        if resumed is not None:
            print(f"resuming {recipe.resume} ({resumed})")
        sys.stdout.flush()
    return recipe, run_dir


def _check_run_dir(run_dir: Path) -> None:
    """Refuse a folder that cannot be made or written."""
    try:
        run_dir.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"run_dir={str(run_dir)!r} cannot be made: {reason}.") from None
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"run_dir={run_dir} cannot be made: {existing} is not a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run_dir={run_dir} cannot be written: {existing} is read-only.")


def _in_world(recipe: Recipe, here: Launched) -> Recipe:
    """The launcher has decided the number of ranks: more of them are data-parallel."""
    if recipe.layout.world_size not in (None, here.world_size):
        raise UserError(
            f"world_size={recipe.layout.world_size} was asked for, and the launcher has started "
            f"{here.world_size} ranks. Leave world_size out, or start the job otherwise."
        )
    nodes = here.world_size // here.local_world_size
    refuse_unshared(recipe.run_dir, nodes)
    layout = dataclasses.replace(recipe.layout, world_size=here.world_size)
    if nodes > 1:
        refuse_illegal(layout, shape_of(recipe), gpus_per_node=here.local_world_size)
    return dataclasses.replace(recipe, layout=layout)
