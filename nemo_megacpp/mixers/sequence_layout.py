"""Which tokens of a sequence a context-parallel rank holds, and the change between layouts.

Attention wants the sequence sharded in Megatron's zigzag (``get_batch_on_this_cp_rank``): of
``2·cp`` equal chunks, rank ``r`` holds chunk ``r`` and chunk ``2·cp - 1 - r``, which balances
causal work. A scan wants tokens in order: either the whole sequence with heads sharded instead, or
one contiguous segment per rank with the state handed on. This module owns the orders and every
change from one to another; all mixers use it.

Types on cp: a *sequence-sharded* tensor is V (tokens), a *head-sharded* one is V (channels), a
gathered one is R (its gradient is partial, and is reduce-scattered on the way back).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_context_parallel import (
    _all_to_all_cp2hp,
    _all_to_all_hp2cp,
    _redo_attention_load_balancing,
    _undo_attention_load_balancing,
)
from megatron.core.tensor_parallel import all_to_all
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch.distributed import ProcessGroup as Group


def positions_of_rank(length: int, cp: int, rank: int) -> torch.Tensor:
    """Return the global positions ``[s/cp]`` that cp rank ``rank`` holds in the zigzag order."""
    if cp == 1:
        return torch.arange(length)
    assert length % (2 * cp) == 0, (length, cp)
    chunks = torch.arange(length).chunk(2 * cp)
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]])


def document_ids(packed: PackedSeqParams, length: int) -> torch.Tensor:
    """Return the document number ``[s]`` of every token of a pack, in order (tokens beyond the last
    boundary form one more document)."""
    boundaries = (
        packed.cu_seqlens_q_padded
        if packed.cu_seqlens_q_padded is not None
        else packed.cu_seqlens_q
    )
    positions = torch.arange(length, device=boundaries.device)
    return torch.bucketize(positions, boundaries[1:].to(positions.dtype), right=True)


def sequence_to_heads(x: torch.Tensor, cp_group: Group) -> torch.Tensor:
    """Exchange a zigzag share of the tokens for a share of the channels, tokens in order.

    ``[s/cp, b, c]`` to ``[s, b, c/cp]``: rank ``r`` gets channel block ``r``, so channels must be
    laid out head by head. One all-to-all; the backward pass is :func:`heads_to_sequence`.
    """
    if cp_group.size() == 1:
        return x
    return _undo_attention_load_balancing(_all_to_all_cp2hp(x, cp_group), cp_group.size())


def heads_to_sequence(x: torch.Tensor, cp_group: Group) -> torch.Tensor:
    """Undo :func:`sequence_to_heads`: ``[s, b, c/cp]`` to ``[s/cp, b, c]`` in the zigzag order."""
    if cp_group.size() == 1:
        return x
    ordered = _redo_attention_load_balancing(x, cp_group.size())
    return _all_to_all_hp2cp(ordered.contiguous(), cp_group)


def gather_sequence(x: torch.Tensor, cp_group: Group) -> torch.Tensor:
    """Gather what all heads share: ``[s/cp, b, c]`` to ``[s, b, c]``, tokens in order.

    Every rank goes on to use the whole for its own heads, so the gradient is summed over cp while
    it is scattered back.
    """
    if cp_group.size() == 1:
        return x
    gathered = gather_from_sequence_parallel_region(x, group=cp_group)
    return _undo_attention_load_balancing(gathered, cp_group.size())


def zigzag_to_segments(x: torch.Tensor, cp_group: Group) -> torch.Tensor:
    """Exchange a zigzag share for a contiguous segment: rank ``r`` gets tokens ``[r·s/cp, …)``.

    ``[s/cp, b, c]`` to ``[s/cp, b, c]``; one all-to-all in which each rank sends its two chunks.
    """
    cp, rank = cp_group.size(), cp_group.rank()
    if cp == 1:
        return x
    received = _exchange(x, _owner_in_segments, _chunks_in_zigzag, cp_group)
    # Chunks 2r and 2r+1 arrive in the order of the ranks that held them in the zigzag.
    mine = (2 * rank, 2 * rank + 1)
    arrival = sorted(mine, key=lambda chunk: _owner_in_zigzag(chunk, cp))
    parts = dict(zip(arrival, received.chunk(2), strict=True))
    return torch.cat([parts[chunk] for chunk in mine])


def segments_to_zigzag(x: torch.Tensor, cp_group: Group) -> torch.Tensor:
    """Undo :func:`zigzag_to_segments`."""
    cp, rank = cp_group.size(), cp_group.rank()
    if cp == 1:
        return x
    mine = (2 * rank, 2 * rank + 1)
    departure = sorted(mine, key=lambda chunk: _owner_in_zigzag(chunk, cp))
    parts = dict(zip(mine, x.chunk(2), strict=True))
    ordered = torch.cat([parts[chunk] for chunk in departure])
    return _exchange(ordered, _owner_in_zigzag, lambda r, n: (2 * r, 2 * r + 1), cp_group)


def _chunks_in_zigzag(rank: int, cp: int) -> tuple[int, int]:
    return rank, 2 * cp - 1 - rank


def _owner_in_zigzag(chunk: int, cp: int) -> int:
    return chunk if chunk < cp else 2 * cp - 1 - chunk


def _owner_in_segments(chunk: int, cp: int) -> int:
    return chunk // 2


def _exchange(
    x: torch.Tensor,
    owner_after: Callable[[int, int], int],
    chunks_before: Callable[[int, int], tuple[int, int]],
    cp_group: Group,
) -> torch.Tensor:
    """Send each of this rank's two chunks (already in the order of their new owners) to its new
    owner; return what arrives, in the order of the senders."""
    cp, rank, rows = cp_group.size(), cp_group.rank(), x.size(0) // 2

    def sent(source: int, target: int) -> int:
        return rows * sum(owner_after(chunk, cp) == target for chunk in chunks_before(source, cp))

    return all_to_all(
        cp_group,
        x.contiguous(),
        [sent(source, rank) for source in range(cp)],
        [sent(rank, target) for target in range(cp)],
    )
