"""Which tokens of a sequence a context-parallel rank holds, and the change between layouts.

Attention wants the sequence sharded in Megatron's zigzag (``get_batch_on_this_cp_rank``): of
``2·cp`` equal chunks, rank ``r`` holds chunk ``r`` and chunk ``2·cp - 1 - r``, which balances
causal work. A scan wants the whole sequence in order, with heads sharded instead. This module owns
both orders and every change from one to the other.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams


def positions_of_rank(length: int, cp: int, rank: int) -> torch.Tensor:
    """Return the global positions ``[length/cp]`` that cp rank ``rank`` holds, in its order."""
    if cp == 1:
        return torch.arange(length)
    assert length % (2 * cp) == 0, (length, cp)
    first, second = rank, 2 * cp - 1 - rank
    chunks = torch.arange(length).chunk(2 * cp)
    return torch.cat([chunks[first], chunks[second]])


def document_ids(packed: PackedSeqParams, length: int) -> torch.Tensor:
    """Return the document number ``[length]`` of every token of a pack (tokens beyond the last
    boundary form one more document)."""
    boundaries = (
        packed.cu_seqlens_q_padded
        if packed.cu_seqlens_q_padded is not None
        else packed.cu_seqlens_q
    )
    positions = torch.arange(length, device=boundaries.device)
    return torch.bucketize(positions, boundaries[1:].to(positions.dtype), right=True)
