"""Which folder holds a checkpoint: NeMo's, Megatron's, a bare one, or a run's newest."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nemo_megacpp.checkpoint import manifest
from nemo_megacpp.checkpoint.identity import FILE as IDENTITY
from nemo_megacpp.checkpoint.identity import Identity, read_identity
from nemo_megacpp.checkpoint.safe_pickle import METADATA
from nemo_megacpp.core.checkpoints import COMMON, TRACKER, newest_iteration
from nemo_megacpp.errors import UserError

WEIGHTS = "weights"
DELETING = ".deleting"
"""Suffix of the name of a checkpoint that is being removed."""
DAMAGED = ".damaged"
"""Suffix of the name of a checkpoint that a resumed run has set aside."""
UNFINISHED = "-unfinished"
"""NeMo's mark, a file beside the checkpoint's folder: saving has started and not ended."""

_STEP = re.compile(r"step=(\d{1,12})")
NO_STEP = 10**12
"""Counts as the newest: what cannot say its step is not overlooked."""


def find_weights(directory: Path) -> Path:
    """Return the folder with ``.metadata`` in it: ``directory`` itself, or its ``weights``.

    Raises:
        UserError: there is no such folder, or no distributed checkpoint in it.
    """
    for folder in (directory, directory / WEIGHTS):
        if (folder / METADATA).is_file():
            return folder
    if not directory.exists():
        raise UserError(f"There is no checkpoint at {directory}: there is no such folder.")
    if (directory / COMMON).exists() or (directory / WEIGHTS).is_dir():
        raise UserError(
            f"The checkpoint {directory} is incomplete: its run ended while it was being saved "
            f"({METADATA} is missing)."
        )
    if any(directory.glob("*.safetensors")):
        raise UserError(
            f"{directory} holds safetensors files, which are not a checkpoint. Make one of them: "
            f"nemo-megacpp checkpoint import {directory} OUT (with --from hf if Hugging Face's "
            f"transformers made them)."
        )
    raise UserError(
        f"There is no checkpoint at {directory}: it is neither a checkpoint (with {METADATA} or "
        f"{WEIGHTS}/{METADATA} in it) nor a run folder with a complete one under checkpoints/."
    )


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a user means by ``path``.

    Args:
        path: a checkpoint (NeMo's, with ``weights/`` in it; Megatron's ``iter_0000100``; a bare
            folder of weights), the ``weights/`` of one, the folder into which Megatron's script
            saves, or a run folder, whose newest checkpoint is meant.

    Raises:
        UserError: there is none, or the newest of a run is damaged.
    """
    if path.name == WEIGHTS and (path / METADATA).is_file():
        return path.parent
    if (newest := newest_iteration(path)) is not None:
        path = newest
    elif (folder := run_checkpoints(path)) is not None:
        return newest_undamaged(folder)
    find_weights(path)
    return path


def is_complete_checkpoint(directory: Path) -> bool:
    """Whether a checkpoint of ours was saved completely, and still has all its files.

    Its manifest decides. An old identity names no manifest, and was itself written last.
    """
    try:
        identity = read_identity(directory)
        return identity is not None and _damage(directory, identity) is None
    except UserError:
        return False


class Saved(NamedTuple):
    """A checkpoint in a run's folder.

    Attributes:
        step: optimizer steps that it holds; where it cannot say so, of its name.
        path: its folder.
        damage: why it cannot be used, in a sentence; None for one that is complete. Contents are
            not read.
    """

    step: int
    path: Path
    damage: str | None


def saved_checkpoints(folder: Path) -> list[Saved]:
    """Return the checkpoints that were saved into ``folder``, by step, damaged ones included.

    A save that has not ended, or that a crash has cut short, is none: NeMo's mark is beside it.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or path.name.endswith((DELETING, DAMAGED)):
            continue
        if not path.is_dir() or path.with_name(path.name + UNFINISHED).exists():
            continue
        name = _STEP.fullmatch(path.name)
        step = int(name[1]) if name else NO_STEP
        try:
            identity = read_identity(path)
        except UserError as error:
            found.append(Saved(step, path, str(error)))
            continue
        if identity is not None:
            found.append(Saved(identity["step"], path, _damage(path, identity)))
        elif name and (path / WEIGHTS).exists():
            found.append(Saved(step, path, f"The checkpoint {path} has lost its {IDENTITY}."))
    return sorted(found)


def _damage(directory: Path, identity: Identity) -> str | None:
    if "manifest" in identity or (directory / manifest.FILE).exists():
        try:
            manifest.check_manifest(directory, full=False)
        except UserError as error:
            return str(error)
    return None


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return step and path of every complete checkpoint in ``folder``, oldest first."""
    return [(step, path) for step, path, damage in saved_checkpoints(folder) if damage is None]


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint in ``folder`` with the largest step."""
    found = complete_checkpoints(folder)
    return found[-1][1] if found else None


def run_checkpoints(path: Path) -> Path | None:
    """Return the folder with a run's checkpoints if ``path`` is that, or the run's."""
    if (path / METADATA).is_file() or (path / WEIGHTS).is_dir() or (path / TRACKER).is_file():
        return None
    folders = (path / "checkpoints", path)
    return next((folder for folder in folders if saved_checkpoints(folder)), None)


def newest_undamaged(folder: Path) -> Path:
    """Return the newest checkpoint in a folder with at least one.

    Raises:
        UserError: it is damaged; the message names the newest that is not.
    """
    saved = saved_checkpoints(folder)
    if saved[-1].damage is None:
        return saved[-1].path
    intact = newest_checkpoint(folder)
    other = f"name {intact} to take the newest that is complete" if intact else "none is complete"
    raise UserError(f"{saved[-1].damage} It is the newest in {folder}; {other}.")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` to write into; it becomes ``out`` if nothing is raised.

    Raises:
        UserError: ``out`` exists and is not an empty folder, or cannot be created, or an OSError
            ended the block.
    """
    if out.is_symlink():  # what is done would not become what it points to
        raise UserError(f"{out} is a symbolic link; give a folder that does not exist.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already; give a folder that does not.")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be created: {error.strerror}.") from None
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out} was not written: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
