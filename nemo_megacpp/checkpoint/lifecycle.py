"""Checkpoints on the disk: saved, pruned and removed, each safe against a crash.

A checkpoint is complete from the moment its manifest is renamed into place to the moment its folder
is renamed for removal. What a crash leaves between is recognised by that, and removed at the next
start.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_megacpp.checkpoint import manifest
from nemo_megacpp.checkpoint.folder import (
    DAMAGED,
    DELETING,
    UNFINISHED,
    complete_checkpoints,
    is_complete_checkpoint,
    saved_checkpoints,
)
from nemo_megacpp.checkpoint.identity import write_identity
from nemo_megacpp.errors import UserError


def begin_checkpoint(directory: Path) -> None:
    """Create an empty folder for a checkpoint; what a crashed save left there is removed first.

    Raises:
        UserError: a complete checkpoint is there.
    """
    if directory.exists():
        if is_complete_checkpoint(directory):
            raise UserError(
                f"{directory} exists already, and a run that resumed from an earlier step would "
                f"overwrite it. Give it another run_dir."
            )
        remove_checkpoint(directory)
    directory.mkdir(parents=True)


def finish_checkpoint(directory: Path, identity: Mapping[str, Any], step: int) -> None:
    """Complete a checkpoint whose weights are all saved; called on one rank.

    When this returns, the checkpoint survives a power cut.

    Args:
        directory: the checkpoint's folder.
        identity: what :func:`nemo_megacpp.checkpoint.identity.read_identity` will return.
        step: optimizer steps that it holds.

    Raises:
        OSError: from the file system; the checkpoint is not complete.
    """
    write_identity(directory, {**identity, "manifest": manifest.FILE}, step)
    manifest.write_manifest(directory)
    manifest.sync(directory.parent)


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint, which is incomplete from the first moment on."""
    doomed = directory.with_name(directory.name + DELETING)
    if doomed.exists():
        shutil.rmtree(doomed)
    directory.rename(doomed)
    manifest.sync(doomed.parent)
    shutil.rmtree(doomed)


def prune(folder: Path, saved: Path, keep_latest: int, keep_every: int | None = None) -> list[Path]:
    """Remove the checkpoints that need not be kept, once ``saved`` is complete.

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
    if not is_complete_checkpoint(saved):
        return []
    complete = complete_checkpoints(folder)
    kept = {saved, *(path for _, path in complete[-keep_latest:])}
    doomed = [
        path
        for step, path in complete
        if path not in kept and (keep_every is None or step % keep_every)
    ]
    for path in doomed:
        remove_checkpoint(path)
    return doomed


def set_damaged_aside(folder: Path, step: int) -> list[str]:
    """Rename the damaged checkpoints of a folder, so that a run may save those steps again.

    Args:
        folder: of the run's checkpoints.
        step: of the checkpoint that the run resumes; newer ones were found damaged.

    Returns:
        A line for each.
    """
    lines = []
    for found in saved_checkpoints(folder):
        if found.damage is not None or found.step > step:
            aside, count = found.path.with_name(found.path.name + DAMAGED), 1
            while aside.exists():
                count += 1
                aside = found.path.with_name(f"{found.path.name}.{count}{DAMAGED}")
            found.path.rename(aside)
            lines.append(f"renamed the damaged checkpoint {found.path} to {aside.name}")
    return lines


def clear_leftovers(folder: Path) -> list[str]:
    """Remove what a crashed run left: checkpoints that were being saved or removed.

    Returns:
        A line for each.
    """
    if not folder.is_dir():
        return []
    lines = []
    for path in sorted(folder.glob(f"*{DELETING}")):
        shutil.rmtree(path)
        lines.append(f"removed {path}: a run ended while it was being removed")
    for mark in sorted(folder.glob(f"*{UNFINISHED}")):
        directory = mark.with_name(mark.name.removesuffix(UNFINISHED))
        if directory.is_dir() and not is_complete_checkpoint(directory):
            remove_checkpoint(directory)
            lines.append(f"removed {directory}: a run ended while it was being saved")
        mark.unlink()
    return lines
