"""Where a run writes: its folder and its loggers."""

from __future__ import annotations

import datetime
import importlib.util
import itertools
import os
from pathlib import Path

import psutil

from nemo_megacpp.checkpoint.folder import newest_checkpoint
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe

_calls = itertools.count(1)


def validate_run_dir(run_dir: Path, resume: str | None, resumes: bool) -> None:
    """Validate the folder of a run.

    Args:
        run_dir: the folder.
        resume: the checkpoint that the run resumes, if it resumes one.
        resumes: whether it was asked to, even if ``resume=auto`` finds that nothing was saved yet.

    Raises:
        UserError: it cannot be made or written, or holds another run, or newer checkpoints.
    """
    _validate_writable(run_dir)
    if not resumes and (run_dir / "checkpoints").exists():
        raise UserError(
            f"{run_dir} already holds a run. Resume it with resume=auto, or choose another run_dir."
        )
    newest = newest_checkpoint(run_dir / "checkpoints")
    if newest is not None and newest.resolve() != Path(str(resume)).resolve():
        raise UserError(
            f"{run_dir} already holds a run, whose newest checkpoint is {newest.name}: a run that "
            f"resumes {resume} would overwrite it. Resume the newest with "
            f"resume=auto, or choose another run_dir."
        )


def _validate_writable(run_dir: Path) -> None:
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


def validate_loggers(recipe: Recipe) -> None:
    """Refuse a logger that is not installed.

    Raises:
        UserError: with what to install.
    """
    wanted = {"wandb": recipe.training.wandb_project is not None}
    wanted["tensorboard"] = recipe.training.tensorboard
    for name, asked in wanted.items():
        if asked and importlib.util.find_spec(name) is None:
            leave = "tensorboard=false" if name == "tensorboard" else "no wandb_project"
            raise UserError(f"{name} is not installed: pip install {name}, or give {leave}.")
    if recipe.training.wandb_name is not None and recipe.training.wandb_project is None:
        raise UserError("wandb_name is given without wandb_project, which turns the logging on.")


def validate_shared(run_dir: str | None, nodes: int) -> None:
    """Refuse to let each node of a job choose a folder.

    Raises:
        UserError: several nodes, and no folder that all of them write.
    """
    if nodes > 1 and run_dir is None:
        raise UserError(
            f"A run on {nodes} nodes needs run_dir=FOLDER, a folder that all nodes see: each node "
            f"would choose one of its own."
        )


def new_run_dir(name: str, started_by_parent: bool) -> str:
    """Return a new folder's name, the same in every rank of a job on this machine.

    Each rank resolves the recipe for itself. What they have in common is the process that started
    them, so the name carries the time at which that process began.

    Args:
        name: of the recipe.
        started_by_parent: whether a launcher started this process as a rank; else the process
            itself is the one that started the others.
    """
    process = psutil.Process()
    if started_by_parent:
        process = process.parent() or process
    stamp = datetime.datetime.fromtimestamp(process.create_time()).strftime("%Y%m%d-%H%M%S")
    call = next(_calls)
    return str(Path("runs") / f"{name}-{stamp}{'' if call == 1 else f'-{call}'}")
