"""Which tokens of a sequence a context-parallel rank holds, and the change between layouts.

Attention wants the sequence sharded in Megatron's zigzag: of ``2·cp`` equal chunks of a document,
rank ``r`` holds chunk ``r`` and chunk ``2·cp - 1 - r``, which balances causal work. A row of one
document is one such zigzag (``get_batch_on_this_cp_rank``); in a row that packs several
(``PackedSeqParams``) every document is dealt so, and a rank holds its chunks of all of them in the
order of the documents (Megatron's rotary embedding for ``thd``, and Transformer Engine's
``thd_get_partitioned_indices``). A scan wants tokens in order: either the whole sequence with heads
sharded instead, or one contiguous segment per rank with the state handed on.

This module owns the orders (:class:`TokenOrder`) and every change from one to another; all mixers
use it.

Types on cp: a *sequence-sharded* tensor is V (tokens), a *head-sharded* one is V (channels), a
gathered one is R (its gradient is partial, and is reduce-scattered on the way back).
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_context_parallel import _all_to_all_cp2hp, _all_to_all_hp2cp
from megatron.core.tensor_parallel import all_to_all
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch.distributed import ProcessGroup as Group
from torch.utils.weak import WeakTensorKeyDictionary

from nemo_megacpp.core.batches import deal_over_cp
from nemo_megacpp.errors import UserError

# What Megatron's ``get_thd_batch_on_this_cp_rank`` leaves whole.
_NOT_BY_TOKEN = ("attention_mask", "cu_seqlens", "cu_seqlens_padded", "max_seqlen")


class TokenOrder:
    """Where the tokens of one row lie over cp; see :func:`token_order`.

    Attributes:
        cp: number of ranks.
        boundaries: start of every document, and the length ``s`` of the row.
        positions: global position of the token at each place when the ranks' shares are laid end
            to end, ``[s]``.
        places: its inverse: the place of each token, ``[s]``.
        documents: number of each token's document, in order, ``[s]``; None in a row of one.
    """

    def __init__(self, boundaries: tuple[int, ...], cp: int, device: torch.device):
        length = boundaries[-1]
        self.cp, self.boundaries = cp, boundaries
        bounds = torch.tensor(boundaries, device=device)
        everywhere = torch.arange(length, device=device)
        several = sum(start < end for start, end in pairwise(boundaries)) > 1
        self.documents = torch.bucketize(everywhere, bounds[1:], right=True) if several else None

        # A share is a pack as well, in which every document has one part in cp of its tokens.
        share = torch.arange(length // cp, device=device)
        document = torch.bucketize(share, bounds[1:] // cp, right=True)
        start, end = bounds[document], bounds[document + 1]
        within, chunk = share - start // cp, (end - start) // (2 * cp)
        rank = torch.arange(cp, device=device)[:, None]
        # The second chunk of rank r is chunk 2cp-1-r, and one chunk of those before it is its own.
        skipped = torch.where(within < chunk, rank, 2 * cp - 2 - rank)
        self.positions = (start + within + skipped * chunk).flatten()
        self.places = torch.argsort(self.positions)

        # A share is ascending, so to exchange it for a segment a rank sends consecutive pieces;
        # what comes is ascending by sender, and has to be merged.
        segment = self.positions // (length // cp)
        arriving = self.positions[torch.argsort(segment, stable=True)].view(cp, -1)
        self._merge = torch.argsort(arriving, dim=1)
        self._unmerge = torch.argsort(self._merge, dim=1)

    @cached_property
    def _sent(self) -> list[list[int]]:
        """Tokens that a rank sends to each segment; read from the device where it is first used."""
        cp, share = self.cp, self.boundaries[-1] // self.cp
        sender = torch.arange(cp, device=self.positions.device).repeat_interleave(share)
        pairs = sender * cp + self.positions // share
        return torch.bincount(pairs, minlength=cp * cp).view(cp, cp).tolist()

    def of_rank(self, rank: int) -> torch.Tensor:
        """Return the global positions ``[s/cp]`` of the tokens that ``rank`` holds, ascending."""
        return self.positions.view(self.cp, -1)[rank]


def token_order(
    length: int, cp: int, packed: PackedSeqParams | None = None, device: torch.device | str = "cpu"
) -> TokenOrder:
    """Return the order over ``cp`` ranks of a row of ``length`` tokens (of all ranks together).

    Documents lie by ``cu_seqlens_q_padded`` where that is given, else by ``cu_seqlens_q``. Tokens
    beyond the last boundary are one more document with CP=1, as for Megatron's Mamba mixer.

    Raises:
        UserError: the boundaries do not describe the row; or with CP > 1 a document does not divide
            into ``2·cp`` chunks, or tokens lie beyond the last boundary (Megatron deals them to no
            rank).
    """
    boundaries = (0, length) if packed is None else _boundaries(packed, length, cp)
    if cp > 1:
        _check_chunks(boundaries, cp, is_pack=packed is not None)
    return _token_order(boundaries, cp, torch.device(device))


@lru_cache(maxsize=16)
def _token_order(boundaries: tuple[int, ...], cp: int, device: torch.device) -> TokenOrder:
    """All layers of a model ask for the same few orders."""
    with torch.inference_mode(False):  # else an evaluation would keep training from using it
        return TokenOrder(boundaries, cp, device)


def _boundaries(packed: PackedSeqParams, length: int, cp: int) -> tuple[int, ...]:
    padded = packed.cu_seqlens_q_padded
    name, tensor = (
        ("cu_seqlens_q", packed.cu_seqlens_q) if padded is None else ("cu_seqlens_q_padded", padded)
    )
    boundaries = _on_host(tensor)
    if len(boundaries) < 2 or boundaries[0] != 0 or list(boundaries) != sorted(boundaries):
        raise UserError(
            f"{name} must start at 0 and never fall; it is {_shown(boundaries)}. It holds the start"
            f" of every document of the row and the end of the last."
        )
    last = boundaries[-1]
    if last > length or (last < length and cp > 1):
        raise UserError(
            f"{name} ends at {last}, the row has {length} tokens"
            + (f" over CP={cp}" if cp > 1 else "")
            + f": its last entry must be {length}"
            + (
                ". With CP > 1 no rank is dealt the tokens beyond it; make them a document."
                if last < length
                else "."
            )
        )
    return boundaries if last == length else (*boundaries, length)


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Tensor -> its version when it was read, and what it held."""


def _on_host(tensor: torch.Tensor) -> tuple[int, ...]:
    """Read a tensor once, however many layers ask: a read from a GPU waits for all of its work."""
    if tensor.is_inference():  # has no version, by which a later change could be seen
        return tuple(tensor.tolist())
    version, values = _read.get(tensor, (None, ()))
    if version != tensor._version:
        values = tuple(tensor.tolist())
        _read[tensor] = tensor._version, values
    return values


def _check_chunks(boundaries: tuple[int, ...], cp: int, is_pack: bool) -> None:
    lengths = [end - start for start, end in pairwise(boundaries)]
    if not any(length % (2 * cp) for length in lengths):
        return
    rule = f"each CP rank takes one chunk from either end of it, so it needs a multiple of {2 * cp}"
    if not is_pack:
        raise UserError(f"A row of {lengths[0]} tokens with CP={cp}: {rule}.")
    wrong = [f"{i} has {n}" for i, n in enumerate(lengths) if n % (2 * cp)]
    legal = [c for c in range(1, cp) if c == 1 or not any(n % (2 * c) for n in lengths)]
    raise UserError(
        f"Packed documents with CP={cp}: for every document, {rule} tokens; document "
        f"{_shown(wrong)}. Pad each document (cu_seqlens_q_padded), or choose CP from "
        f"{', '.join(str(c) for c in legal)}."
    )


def _shown(items: Any, most: int = 8) -> str:
    more = f" … ({len(items)} in all)" if len(items) > most else ""
    return ", ".join(str(item) for item in items[:most]) + more


def split_batch_for_cp(
    batch: dict[str, Any], packed: PackedSeqParams | None = None, cp_group: Group | None = None
) -> dict[str, Any]:
    """Return this cp rank's share of a batch: Megatron's ``get_batch_on_this_cp_rank``, for packs
    too (its ``get_thd_batch_on_this_cp_rank`` needs Transformer Engine).

    Args:
        batch: tensors ``[b, s, …]`` by name (``tokens``, ``labels``, ``loss_mask``,
            ``position_ids``, …) or None. With packs, ``attention_mask`` and the lengths
            (``cu_seqlens``, ``cu_seqlens_padded``, ``max_seqlen``) are returned as they are.
        packed: the documents of the row, by their boundaries in the whole row; the model takes the
            same object in every layout.
        cp_group: Megatron's context-parallel group if not given.

    Raises:
        UserError: see :func:`token_order`.
    """
    if packed is None:
        return deal_over_cp(batch, cp_group)
    if cp_group is None:
        cp_group = parallel_state.get_context_parallel_group()

    def share(value: torch.Tensor) -> torch.Tensor:
        order = token_order(value.size(1), cp_group.size(), packed, value.device)
        return value.index_select(1, order.of_rank(cp_group.rank()))

    return {
        name: value if value is None or name in _NOT_BY_TOKEN else share(value)
        for name, value in batch.items()
    }


class _Rearrange(torch.autograd.Function):
    """Both ways a gather: the stock backward pass of one would add into zeros, row by row."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.inverse = inverse
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.inverse), None, None


_rearranged = _Rearrange.apply


def sequence_to_heads(x: torch.Tensor, cp_group: Group, order: TokenOrder) -> torch.Tensor:
    """Exchange a zigzag share of the tokens for a share of the channels, tokens in order.

    ``[s/cp, b, c]`` to ``[s, b, c/cp]``: rank ``r`` gets channel block ``r``, so channels must be
    laid out head by head. One all-to-all; the backward pass is :func:`heads_to_sequence`.
    """
    if cp_group.size() == 1:
        return x
    return _rearranged(_all_to_all_cp2hp(x, cp_group), order.places, order.positions)


def heads_to_sequence(x: torch.Tensor, cp_group: Group, order: TokenOrder) -> torch.Tensor:
    """Undo :func:`sequence_to_heads`: ``[s, b, c/cp]`` to ``[s/cp, b, c]`` in the zigzag order."""
    if cp_group.size() == 1:
        return x
    return _all_to_all_hp2cp(_rearranged(x, order.positions, order.places), cp_group)


def gather_sequence(x: torch.Tensor, cp_group: Group, order: TokenOrder) -> torch.Tensor:
    """Gather what all heads share: ``[s/cp, b, c]`` to ``[s, b, c]``, tokens in order.

    Every rank uses the whole for its own heads, so the gradient is reduce-scattered over cp.
    """
    if cp_group.size() == 1:
        return x
    gathered = gather_from_sequence_parallel_region(x, group=cp_group)
    return _rearranged(gathered, order.places, order.positions)


def zigzag_to_segments(x: torch.Tensor, cp_group: Group, order: TokenOrder) -> torch.Tensor:
    """Exchange a zigzag share for a contiguous segment: rank ``r`` gets tokens ``[r·s/cp, …)``.

    ``[s/cp, b, c]`` to ``[s/cp, b, c]``; one all-to-all in which a token is sent once. A segment
    may end amid a document.
    """
    cp, rank = cp_group.size(), cp_group.rank()
    if cp == 1:
        return x
    received = all_to_all(
        cp_group, x.contiguous(), [order._sent[r][rank] for r in range(cp)], order._sent[rank]
    )
    return _rearranged(received, order._merge[rank], order._unmerge[rank])


def segments_to_zigzag(x: torch.Tensor, cp_group: Group, order: TokenOrder) -> torch.Tensor:
    """Undo :func:`zigzag_to_segments`."""
    cp, rank = cp_group.size(), cp_group.rank()
    if cp == 1:
        return x
    by_owner = _rearranged(x, order._unmerge[rank], order._merge[rank])
    return all_to_all(
        cp_group, by_owner, order._sent[rank], [order._sent[r][rank] for r in range(cp)]
    )
