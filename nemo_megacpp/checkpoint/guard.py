"""Before a checkpoint is loaded: verify its bytes, and refuse pickles that would run code.

What is loaded at all, and what is said, depends on what a folder says of itself:

==============================  ====================================================================
intact manifest                 every byte is compared; one that differs is refused
an identity that names a        refused: the manifest was removed, or the save did not end.
manifest, and no manifest       ``verify_checkpoint=false`` or ``--no-verify`` load it
an identity of an old version,  loaded, and a line says that nothing was verified
no manifest
neither: from elsewhere         loaded likewise, but only by its own path, never as a run's newest;
(Megatron's, NeMo's)            ``reshard`` refuses it, as it does not say its model
an export without a manifest    ``import`` refuses it; ``--no-verify`` imports it
==============================  ====================================================================

The pickles are scanned in every case. ``inspect`` loads nothing and prints what it finds.
"""

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


def guard_load(directory: Path, *, verify: bool) -> Path:
    """Validate on all ranks of the default process group, right before they load.

    Rank 0 compares the checkpoint with its manifest; the ranks divide the pickles.

    Args:
        directory: the checkpoint, or its weights. That of rank 0 counts: it has read the contents,
            and may have chosen an older one than the other ranks.
        verify: whether to compare every byte with the manifest.

    Returns:
        The ``directory`` of rank 0, which all ranks load.

    Raises:
        UserError: on every rank, whichever found it.
    """
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    chosen = [str(directory)]
    dist.broadcast_object_list(chosen, src=0)
    directory, refusal = Path(chosen[0]), None
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
    return directory
