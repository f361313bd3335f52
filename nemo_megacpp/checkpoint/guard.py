"""Before a checkpoint is loaded: is it what was saved, and would loading it run code?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nemo_megacpp.checkpoint.folder import find_weights
from nemo_megacpp.checkpoint.manifest import check_manifest
from nemo_megacpp.checkpoint.safe_pickle import scan_checkpoint
from nemo_megacpp.errors import UserError


def inspect_before_load(directory: Path, *, verify: bool = True) -> str:
    """Verify a checkpoint in the process that decides to load it.

    Args:
        directory: the checkpoint.
        verify: whether to compare every byte with the manifest. Its pickles are scanned always.

    Returns:
        One phrase that says what was verified, or that there was nothing to verify against.

    Raises:
        UserError: it is damaged, or loading it would run code.
    """
    found = str(check_manifest(directory)) if verify else "not verified"
    scan_checkpoint(find_weights(directory))
    return found


def guard_load(directory: Path, *, verify: bool) -> None:
    """Check on all ranks of the default process group, right before they load; they divide it.

    Rank 0 compares the checkpoint with its manifest, if asked to; the pickles, which the loaders
    will run, are scanned by the ranks in turns. All ranks raise if one finds something.

    Args:
        directory: the checkpoint, or its weights.
        verify: whether to compare every byte with the manifest.

    Raises:
        UserError: on every rank.
    """
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()

    def check() -> None:
        if verify and rank == 0:
            check_manifest(directory)
        scan_checkpoint(find_weights(directory), rank, ranks)

    _together(check, ranks)


def _together(check: Callable[[], None], ranks: int) -> None:
    """Run ``check`` on every rank; what one raises, all raise."""
    import torch.distributed as dist

    refusal = None
    try:
        check()
    except UserError as error:
        refusal = str(error)
    refusals: list[str | None] = [None] * ranks
    dist.all_gather_object(refusals, refusal)
    for refusal in refusals:
        if refusal is not None:
            raise UserError(refusal)
