"""Before a checkpoint is loaded: verify its bytes, and refuse pickles that would run code."""

from __future__ import annotations

from pathlib import Path

from nemo_megacpp.checkpoint.folder import find_weights
from nemo_megacpp.checkpoint.manifest import check_manifest
from nemo_megacpp.checkpoint.safe_pickle import scan_checkpoint
from nemo_megacpp.errors import UserError


def inspect_before_load(directory: Path, *, verify: bool = True) -> str:
    """Validate a checkpoint in the process that decides to load it.

    Args:
        directory: the checkpoint.
        verify: whether to compare every byte with the manifest. Its pickles are scanned always.

    Returns:
        One phrase that says what was verified, or that there was nothing to verify against.

    Raises:
        UserError: it is damaged, or loading it would run code.
    """
    found = check_manifest(directory) if verify else "not verified"
    scan_checkpoint(find_weights(directory))
    return found


def guard_load(directory: Path, *, verify: bool) -> None:
    """Validate on all ranks of the default process group, right before they load.

    Rank 0 compares the checkpoint with its manifest; the ranks divide the pickles.

    Args:
        directory: the checkpoint, or its weights.
        verify: whether to compare every byte with the manifest.

    Raises:
        UserError: on every rank, whichever found it.
    """
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    refusal = None
    try:
        if verify and rank == 0:
            check_manifest(directory)
        scan_checkpoint(find_weights(directory), rank, ranks)
    except UserError as error:
        refusal = str(error)
    refusals: list[str | None] = [None] * ranks
    dist.all_gather_object(refusals, refusal)
    for refusal in filter(None, refusals):
        raise UserError(refusal)
