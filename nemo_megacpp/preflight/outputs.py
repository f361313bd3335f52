"""The outputs of a run: folder, loggers, profile."""

from __future__ import annotations

import datetime
import importlib.util
import itertools
import os
from collections.abc import Collection
from pathlib import Path

import psutil

from nemo_megacpp.checkpoint.folder import complete_checkpoints
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.runtime.launch import launched

_calls = itertools.count(1)


def validate_run_dir(
    run_dir: Path, resume: str | None, resumes: bool, skipped: Collection[Path] = ()
) -> None:
    """Validate the folder of a run.

    Args:
        run_dir: the folder.
        resume: the checkpoint that the run resumes, if it resumes one.
        resumes: whether ``resume`` was given, even if ``resume=auto`` has found no checkpoint.
        skipped: damaged checkpoints, which do not count.

    Raises:
        UserError: it cannot be created or written, or holds another run, or newer checkpoints.
    """
    _validate_writable(run_dir)
    if not resumes and (run_dir / "checkpoints").exists():
        raise UserError(
            f"{run_dir} already holds a run. Resume it with resume=auto, or choose another run_dir."
        )
    validate_newest(run_dir, resume, skipped)


def validate_newest(run_dir: Path, resume: str | None, skipped: Collection[Path] = ()) -> None:
    """Refuse to write newer checkpoints over those of a folder.

    Raises:
        UserError: the folder's newest checkpoint, apart from ``skipped``, is not ``resume``.
    """
    ignored = {path.resolve() for path in skipped}
    complete = (path for _, path in complete_checkpoints(run_dir / "checkpoints"))
    newest = next((path for path in [*complete][::-1] if path.resolve() not in ignored), None)
    if newest is not None and newest.resolve() != Path(str(resume)).resolve():
        how = "starts anew" if resume is None else f"resumes {resume}"
        raise UserError(
            f"{run_dir} already holds a run, whose newest checkpoint is {newest.name}: a run that "
            f"{how} would overwrite it. Resume the newest with resume=auto, or choose another "
            f"run_dir."
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
    training = recipe.training
    if training.wandb_name is not None and training.wandb_project is None:
        raise UserError("wandb_name is given without wandb_project, which turns the logging on.")
    for name, used, leave in (
        ("tensorboard", training.tensorboard, "tensorboard=false"),
        ("wandb", training.wandb_project is not None, "no wandb_project"),
    ):
        if used and importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install {name}, or give {leave}.")


def validate_wandb_login(recipe: Recipe) -> None:
    """Refuse W&B where it would ask for a key, which a rank cannot answer; needs no network.

    Raises:
        UserError: with the ways to log in, and to go without.
    """
    place = launched()
    used = recipe.training.wandb_project is not None and importlib.util.find_spec("wandb")
    if not used or (place is not None and place.rank > 0):  # rank 0 is the one that logs
        return
    import wandb
    from requests.utils import get_netrc_auth

    settings = wandb.setup().settings  # of the environment and of W&B's own files
    wandb.teardown()  # ends the service that setup() has started
    servers = (settings.base_url, "https://api.wandb.ai")  # the second: its default's older name
    known = settings.api_key or getattr(settings, "identity_token_file", None)
    if settings.mode == "online" and not known and not any(map(get_netrc_auth, servers)):
        raise UserError(
            "Weights & Biases is not logged in. Run 'wandb login' or set WANDB_API_KEY; for a run "
            "without network set WANDB_MODE=offline ('wandb sync' uploads it later); or leave out "
            "wandb_project."
        )


def validate_profile(recipe: Recipe) -> None:
    """Refuse a profile of steps or ranks that the run does not have.

    Raises:
        UserError: with the numbers.
    """
    training, world = recipe.training, recipe.layout.world
    if not training.use_pytorch_profiler:
        return
    start, end = training.profile_step_start, training.profile_step_end
    last = training.stop_after or training.max_steps
    if not 0 <= start < end <= last:
        raise UserError(
            f"profile_step_start={start}, profile_step_end={end}: the trace covers the steps after "
            f"the first number up to the second, so they must be 0 ≤ start < end ≤ {last}, the "
            f"last step of the run."
        )
    ranks = training.profile_ranks
    if not ranks or len(set(ranks)) < len(ranks) or not set(ranks) <= set(range(world)):
        raise UserError(
            f"profile_ranks={ranks}: give each rank once, from 0 to {world - 1}: the layout has "
            f"{world} ranks."
        )


def validate_shared(run_dir: str | None, nodes: int) -> None:
    """Refuse several nodes without a common folder.

    Raises:
        UserError: ``run_dir`` is not given.
    """
    if nodes > 1 and run_dir is None:
        raise UserError(
            f"A run on {nodes} nodes needs run_dir=FOLDER, a folder that all nodes mount: "
            f"otherwise each node would choose its own."
        )


def job_process(started_by_parent: bool) -> psutil.Process:
    """Return the process that all ranks of a job on this machine have in common.

    Args:
        started_by_parent: whether a launcher started this process as a rank; else the process
            itself is the one that started the others.
    """
    process = psutil.Process()
    return (process.parent() or process) if started_by_parent else process


def new_run_dir(name: str, started_by_parent: bool) -> str:
    """Return a new folder's name, the same in every rank of a job on this machine.

    Each rank resolves the recipe for itself, so the name carries the time at which the process
    began that all of them have in common.

    Args:
        name: of the recipe.
        started_by_parent: see :func:`job_process`.
    """
    began = datetime.datetime.fromtimestamp(job_process(started_by_parent).create_time())
    stamp, call = began.strftime("%Y%m%d-%H%M%S"), next(_calls)
    return str(Path("runs") / f"{name}-{stamp}{'' if call == 1 else f'-{call}'}")
