"""A checkpoint's life on the disk: begun, finished, kept or removed; each safe against a crash.

A checkpoint counts from the moment its manifest is renamed into place, and ceases to count the
moment its folder is renamed for removal. Whatever a crash leaves between is told from a good one
by that, and is cleared away at the next start.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_megacpp.checkpoint import manifest
from nemo_megacpp.checkpoint.identity import (
    DELETING,
    is_whole,
    whole_checkpoints,
    write_identity,
)
from nemo_megacpp.errors import UserError

UNFINISHED = "-unfinished"
"""NeMo's mark, a file beside the checkpoint's folder: its saving has begun and not ended."""


def begin_checkpoint(directory: Path) -> None:
    """Make an empty folder for a checkpoint; what a crashed save left there is removed first.

    Raises:
        UserError: a whole checkpoint is there.
    """
    if directory.exists():
        if is_whole(directory):
            raise UserError(
                f"{directory} is there already, and would be overwritten by a run that went on "
                f"from an earlier step. Give it another run_dir."
            )
        remove_checkpoint(directory)
    directory.mkdir(parents=True)


def finish_checkpoint(directory: Path, identity: Mapping[str, Any], step: int) -> None:
    """Make a checkpoint whose weights are all there count; called on one rank.

    When this returns, the checkpoint is on the disk, and a power cut does not change that.

    Args:
        directory: the checkpoint's folder.
        identity: what :func:`nemo_megacpp.checkpoint.identity.read_identity` will return.
        step: optimizer steps that it holds.

    Raises:
        OSError: from the file system; the checkpoint does not count.
    """
    write_identity(directory, {**identity, "manifest": manifest.FILE}, step)
    manifest.write_manifest(directory)
    manifest.sync(directory.parent)


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint; from the first moment on it no longer counts."""
    doomed = directory.with_name(directory.name + DELETING)
    if doomed.exists():
        shutil.rmtree(doomed)
    directory.rename(doomed)
    manifest.sync(doomed.parent)
    shutil.rmtree(doomed)


def prune(folder: Path, saved: Path, keep_latest: int, keep_every: int | None = None) -> list[Path]:
    """Remove the checkpoints that need not be kept, once ``saved`` is whole.

    Damaged checkpoints and foreign folders are neither counted nor removed.

    Args:
        folder: of the run's checkpoints.
        saved: the one that was saved last; it is kept.
        keep_latest: how many of the newest, by step, are kept; at least 1.
        keep_every: checkpoints of multiples of this step are kept too.

    Returns:
        What was removed.
    """
    assert keep_latest >= 1, keep_latest
    if not is_whole(saved):
        return []
    whole = whole_checkpoints(folder)
    kept = {saved, *(path for _, path in whole[-keep_latest:])}
    doomed = [
        path
        for step, path in whole
        if path not in kept and (keep_every is None or step % keep_every)
    ]
    for path in doomed:
        remove_checkpoint(path)
    return doomed


def clear_leftovers(folder: Path) -> list[str]:
    """Clear away what a crashed run left: half-saved and half-removed checkpoints.

    Returns:
        A line for each.
    """
    if not folder.is_dir():
        return []
    told = []
    for path in sorted(folder.glob(f"*{DELETING}")):
        shutil.rmtree(path)
        told.append(f"removed {path}: a run ended while it was being removed")
    for mark in sorted(folder.glob(f"*{UNFINISHED}")):
        directory = mark.with_name(mark.name.removesuffix(UNFINISHED))
        if directory.is_dir() and not is_whole(directory):
            remove_checkpoint(directory)
            told.append(f"removed {directory}: a run ended while it was being saved")
        mark.unlink()
    return told
