"""Megatron's distributed checkpoints on the disk: where they lie, and their form."""

from __future__ import annotations

from pathlib import Path

from nemo_megacpp.errors import UserError
from nemo_megacpp.json_files import read_limited
from nemo_megacpp.printable import shown

COMMON = "common.pt"
"""What is not sharded, in a file of its own."""
COMMON_OBJECT = "common_state/shard_0_1"
"""The same, as an object among the tensors, where there is no such file."""
FSDP_ARGUMENTS = "args"
"""Object that only a checkpoint of Megatron's FSDP has: the arguments of its script."""
TRACKER = "latest_checkpointed_iteration.txt"
"""File beside Megatron's checkpoints: the step of the newest."""
_TRACKER_LIMIT = 80
_MOST_DIGITS = 12


def keep_common_file(weights: Path) -> None:
    """Write ``common.pt`` into a checkpoint that was just saved without it.

    From 0.19 on Megatron saves it as an object among the tensors, and reads the file first where
    there is one. 0.16 knows the file only, so with it a checkpoint loads on every release. Called
    on one rank, after the save and before the manifest.
    """
    import torch
    from megatron.core import dist_checkpointing

    path = weights / COMMON
    if not path.exists():
        torch.save(dist_checkpointing.load_common_state_dict(str(weights)), path)


def newest_iteration(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder of Megatron's script, by the script's own file.

    Raises:
        UserError: the file names none.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    text = read_limited(tracker, _TRACKER_LIMIT).decode(errors="replace").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        raise UserError(f"{tracker} names no iteration: {shown(text[:40])}.")
    return iteration_folder(folder, int(text))


def iteration_folder(folder: Path, step: int) -> Path:
    """Return where Megatron keeps the checkpoint of a step among those in ``folder``."""
    return folder / f"iter_{step:07d}"
