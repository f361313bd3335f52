"""The form of a distributed checkpoint on the disk."""

from __future__ import annotations

from pathlib import Path

COMMON = "common.pt"
"""What is not sharded, in a file of its own."""
COMMON_OBJECT = "common_state/shard_0_1"
"""The same, as an object among the tensors, where there is no such file."""


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
