"""Which folder holds a checkpoint: NeMo's, Megatron's, a bare one, or a run's newest."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_megacpp.checkpoint import manifest
from nemo_megacpp.checkpoint.identity import read_identity
from nemo_megacpp.checkpoint.safe_pickle import COMMON, METADATA
from nemo_megacpp.errors import UserError
from nemo_megacpp.json_files import read_limited
from nemo_megacpp.printable import printable, shown

WEIGHTS = "weights"
DELETING = ".deleting"
"""Suffix of the name of a checkpoint that is being removed."""

_TRACKER = "latest_checkpointed_iteration.txt"
_TRACKER_LIMIT = 80
_MOST_DIGITS = 12

_log = logging.getLogger(__name__)


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
    raise UserError(
        f"There is no checkpoint at {directory}: it is neither a checkpoint (with {METADATA} or "
        f"{WEIGHTS}/{METADATA} in it) nor a run folder with a complete one under checkpoints/."
    )


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a user means by ``path``.

    Args:
        path: a checkpoint (NeMo's, with ``weights/`` in it; Megatron's ``iter_0000100``; a bare
            folder of weights), the ``weights/`` of one, the folder into which Megatron's script
            saves, or a run folder, whose newest complete checkpoint is meant.

    Raises:
        UserError: there is none.
    """
    if path.name == WEIGHTS and (path / METADATA).is_file():
        return path.parent
    tracker = path / _TRACKER
    if tracker.is_file():
        text = read_limited(tracker, _TRACKER_LIMIT).decode(errors="replace").strip()
        if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
            raise UserError(f"{tracker} names no iteration: {shown(text[:40])}.")
        path = path / f"iter_{int(text):07d}"
    elif not (path / METADATA).is_file() and not (path / WEIGHTS).is_dir():
        for folder in (path / "checkpoints", path):
            if (found := newest_checkpoint(folder)) is not None:
                return found
    find_weights(path)
    return path


def is_complete_checkpoint(directory: Path) -> bool:
    """Whether a checkpoint of ours was saved completely, and still has all its files.

    Its manifest decides. An old identity names no manifest, and was itself written last.

    Raises:
        UserError: the identity is damaged.
    """
    identity = read_identity(directory)
    if identity is None:
        return False
    if "manifest" in identity or (directory / manifest.FILE).exists():
        return manifest.is_complete(directory)
    return True


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return step and path of every complete checkpoint in ``folder``, oldest first.

    One that does not match its manifest is skipped, and logged.

    Raises:
        UserError: an identity is damaged.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir() or path.name.endswith(DELETING):
            continue
        identity = read_identity(path)
        if identity is None:
            continue
        if is_complete_checkpoint(path):
            found.append((identity["step"], path))
        elif (path / manifest.FILE).exists():
            _log.warning("Skipping %s: it does not match its manifest.", printable(str(path)))
    return sorted(found)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint in ``folder`` with the largest step."""
    found = complete_checkpoints(folder)
    return found[-1][1] if found else None


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` to write into; it becomes ``out`` if nothing is raised.

    Raises:
        UserError: ``out`` exists and is not an empty folder, or cannot be created, or an OSError
            ended the block.
    """
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
