"""The rows of Mamba-3's input projection: their order, and how tp and cp share them.

mamba_ssm orders them by kind, ``[z | x | B | C | dd_dt | dd_A | trap | θ̂]``, with B and C laid out
``(r, g, n)``: a tensor-parallel shard is a slice of each kind, for ``R > 1`` of each ``r``. Here
the split rows are laid out group by group, so that a shard is one contiguous range of rows and a
checkpoint needs no rearranging::

    per group: B (r, n) | C (r, n) | per head of the group: z (p) | x (p) | dd_dt | dd_A | trap

The rows of θ̂, shared by all heads, are a parameter of their own.
"""

from __future__ import annotations

import torch

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixer_settings import Mamba3Dimensions


def rows_per_head(dims: Mamba3Dimensions) -> int:
    """Rows of z, x, dd_dt, dd_A and trap of one head."""
    return 2 * dims.head_dim + 3


def rows_of_group_state(dims: Mamba3Dimensions) -> int:
    """Rows of B and C of one group."""
    return 2 * dims.mimo_rank * dims.state_dim


def split_rows(dims: Mamba3Dimensions) -> int:
    """Rows of the input projection that tp splits: all but those of θ̂."""
    return dims.num_groups * rows_of_group_state(dims) + dims.num_heads * rows_per_head(dims)


def rank_share(dims: Mamba3Dimensions, tp: int, cp: int) -> tuple[int, int, int]:
    """Return what a rank gets: heads and groups of its tp shard, and the copies of a group that
    spreading its heads over cp takes (1: each cp rank gets whole groups).

    Raises:
        UserError: heads or groups cannot be shared out so.
    """
    heads, groups = dims.num_heads // tp, dims.num_groups // tp
    for name in ("num_heads", "num_groups"):
        if getattr(dims, name) % tp:
            raise UserError(
                f"mamba_{name}={getattr(dims, name)} is not divisible by TP={tp}: each rank of a "
                f"Mamba-3 block holds whole groups with their heads."
            )
    if heads % cp:
        raise UserError(
            f"mamba_num_heads={dims.num_heads} / TP={tp} = {heads} heads of a rank are not "
            f"divisible by CP={cp}: under CP a Mamba-3 block spreads them over cp. CP must divide "
            f"{heads}."
        )
    if groups % cp and cp % groups:
        raise UserError(
            f"mamba_num_groups={dims.num_groups} / TP={tp} = {groups} groups of a rank do not fit "
            f"CP={cp}: one must divide the other, so that each cp rank gets whole groups or the "
            f"heads of a single one."
        )
    return heads, groups, 1 if groups % cp == 0 else cp // groups


def cp_blocks(split: torch.Tensor, dims: Mamba3Dimensions, copies: int) -> torch.Tensor:
    """Lay the channels of a tp shard out in equal blocks of whole heads *with* their B and C.

    A group whose heads go to several cp ranks gives each of them a copy of its B and C; the
    gradients of the copies meet in the backward pass. Whole groups are such blocks already.

    Args:
        split: ``[s, b, g·(2RN + (H/G)·(2P+3))]``, this rank's outputs of the split rows.
        dims: sizes.
        copies: as :func:`rank_share` returns it.

    Returns:
        ``[s, b, g·copies·(2RN + (H/G/copies)·(2P+3))]``.
    """
    if copies == 1:
        return split
    state_rows = rows_of_group_state(dims)
    group_rows = state_rows + dims.num_heads // dims.num_groups * rows_per_head(dims)
    by_group = split.unflatten(-1, (-1, group_rows))
    states, heads = by_group.split([state_rows, group_rows - state_rows], dim=-1)
    heads = heads.unflatten(-1, (copies, -1))
    states = states.unsqueeze(-2).expand(*heads.shape[:-1], -1)
    return torch.cat([states, heads], dim=-1).flatten(-3)
