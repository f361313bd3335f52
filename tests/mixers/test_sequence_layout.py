"""Who holds which tokens, against a plain construction from the whole tensor.

Values are small integers in float64, so every comparison is exact, sums of gradients included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_megacpp.core.batches import deal_over_cp
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.sequence_layout import (
    TokenOrder,
    gather_sequence,
    heads_to_sequence,
    segments_to_zigzag,
    sequence_to_heads,
    split_batch_for_cp,
    token_order,
    zigzag_to_segments,
)
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool

Op = Callable[[torch.Tensor, torch.distributed.ProcessGroup, TokenOrder], torch.Tensor]

# Lengths of the documents of a row, in units of 2·cp tokens: one, several, the shortest, an empty.
ROWS: list[tuple[int, ...] | None] = [None, (3,), (1, 3, 2), (2, 1, 1, 1), (1, 0, 2)]


def _pack(ends: Sequence[int]) -> PackedSeqParams:
    boundaries = torch.tensor(ends, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)


def _ends(row: tuple[int, ...], cp: int) -> list[int]:
    unit = 2 * cp if cp > 1 else 5
    return [sum(row[:i]) * unit for i in range(len(row) + 1)]


def _by_hand(ends: list[int], cp: int, rank: int) -> list[int]:
    """Chunks ``rank`` and ``2·cp - 1 - rank`` of every document, in the order of the documents."""
    held: list[int] = []
    for start, end in pairwise(ends):
        size = (end - start) // (2 * cp)
        for chunk in (rank, 2 * cp - 1 - rank):
            held += range(start + chunk * size, start + (chunk + 1) * size)
    return held


def _integers(seed: int, length: int, cp: int) -> torch.Tensor:
    """Return ``[s, b, c]`` with two channels per cp rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-99, 100, (length, 2, 2 * cp), generator=generator).double()


def _exchanges(cp: int) -> dict[str, bool]:
    """On a rank: what each exchange gives and sends back, for every row of ``ROWS``."""
    start_model_parallel(ParallelLayout.parse(f"cp={cp}"))
    group = parallel_state.get_context_parallel_group()
    return {
        f"{name} of {row}": holds
        for row in ROWS
        for name, holds in _exchanges_of(row, cp, group.rank(), group).items()
    }


def _exchanges_of(
    row: tuple[int, ...] | None, cp: int, rank: int, group: torch.distributed.ProcessGroup
) -> dict[str, bool]:
    """Against slices of the whole."""
    ends = _ends(row or (3,), cp)
    length = ends[-1]
    packed = None if row is None else _pack(ends)
    order = token_order(length, cp, packed)
    whole, form = _integers(0, length, cp), _integers(1, length, cp)
    zigzag = torch.tensor(_by_hand(ends, cp, rank)) if cp > 1 else torch.arange(length)
    segment = torch.arange(length).chunk(cp)[rank]
    heads = torch.arange(2 * cp).chunk(cp)[rank]
    share = whole[zigzag]
    tokens = {"tokens": torch.arange(length)[None], "labels": None}
    dealt = split_batch_for_cp(tokens, packed)

    def holds(
        op: Op,
        before: torch.Tensor,
        after: torch.Tensor,
        received: torch.Tensor,
        sent: torch.Tensor,
    ) -> bool:
        """Whether ``op`` maps before to after, and the gradient received to the gradient sent."""
        x = before.clone().requires_grad_()
        y = op(x, group, order)
        (grad,) = torch.autograd.grad(y, x, received)
        return torch.equal(y, after) and torch.equal(grad, sent)

    a, b = whole[:, :, heads], form[:, :, heads]
    sums = sum(range(1, cp + 1))
    return {
        "of_rank": torch.equal(order.of_rank(rank), zigzag),
        "split_batch_for_cp": torch.equal(dealt["tokens"][0], zigzag) and dealt["labels"] is None,
        "the batch is left alone": tokens["tokens"].size(1) == length,
        "as Megatron deals it": row is not None
        or torch.equal(dealt["tokens"], deal_over_cp(tokens, group)["tokens"]),
        "sequence_to_heads": holds(sequence_to_heads, share, a, b, form[zigzag]),
        "heads_to_sequence": holds(heads_to_sequence, a, share, form[zigzag], b),
        "gather_sequence": holds(
            gather_sequence, share, whole, form * (rank + 1), form[zigzag] * sums
        ),
        "zigzag_to_segments": holds(
            zigzag_to_segments, share, whole[segment], form[segment], form[zigzag]
        ),
        "segments_to_zigzag": holds(
            segments_to_zigzag, whole[segment], share, form[zigzag], form[segment]
        ),
        "not contiguous": torch.equal(
            zigzag_to_segments(share.transpose(1, 2), group, order), whole[segment].transpose(1, 2)
        ),
    }


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_exchanges(ranks: WorkerPool, cp: int) -> None:
    for rank, held in enumerate(ranks.run(cp, _exchanges, cp)):
        assert len(held) == 10 * len(ROWS)
        assert all(held.values()), (rank, [name for name, holds in held.items() if not holds])


def _turned(cp: int, ends: list[int]) -> np.ndarray:
    """On a rank: the positions that Megatron's rotary embedding gives to its tokens."""
    start_model_parallel(ParallelLayout.parse(f"cp={cp}"))
    longest = max(end - start for start, end in pairwise(ends))
    angles = torch.arange(longest, dtype=torch.float64)[:, None, None, None].expand(-1, 1, 1, 2)
    units = torch.zeros(ends[-1] // cp, 1, 2, dtype=torch.float64)
    units[..., 0] = 1.0
    turned = _apply_rotary_pos_emb_thd(
        units,
        torch.tensor(ends, dtype=torch.int32),
        angles / longest,
        cp_group=parallel_state.get_context_parallel_group(),
    )
    return (torch.atan2(turned[:, 0, 1], turned[:, 0, 0]) * longest).numpy()


@pytest.mark.parametrize("cp", [2, 4])
def test_order_is_that_of_the_rotary_embedding(ranks: WorkerPool, cp: int) -> None:
    ends = _ends((1, 3, 2), cp)
    within = torch.cat([torch.arange(end - start) for start, end in pairwise(ends)])
    order = token_order(ends[-1], cp, _pack(ends))
    for rank, found in enumerate(ranks.run(cp, _turned, cp, ends)):
        assert abs(found - within[order.of_rank(rank)].numpy()).max() < 1e-9


def test_deal_batch_leaves_lengths_whole(ranks: WorkerPool) -> None:
    for batch in ranks.run(2, _dealt_lengths):
        assert batch == {"tokens": [1, 8], "extra": [1, 8, 3], "cu_seqlens": [3], "max_seqlen": []}


def _dealt_lengths() -> dict[str, list[int]]:
    start_model_parallel(ParallelLayout.parse("cp=2"))
    packed = _pack([0, 4, 16])
    batch = {
        "tokens": torch.arange(16)[None],
        "extra": torch.zeros(1, 16, 3),
        "cu_seqlens": packed.cu_seqlens_q,
        "max_seqlen": torch.tensor(12),
    }
    return {name: list(value.shape) for name, value in split_batch_for_cp(batch, packed).items()}


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([0, 3, 8], [0, 0, 0, 1, 1, 1, 1, 1]),
        ([0, 1, 2, 8], [0, 1, 2, 2, 2, 2, 2, 2]),
        # What follows the last boundary is a document of its own, and an empty one takes a number.
        ([0, 3, 5], [0, 0, 0, 1, 1, 2, 2, 2]),
        ([0, 3, 3, 8], [0, 0, 0, 2, 2, 2, 2, 2]),
        # One document has no boundary to heed.
        ([0, 8], None),
        ([0, 0, 8], None),
    ],
)
def test_documents(ends: list[int], expected: list[int] | None) -> None:
    found = token_order(8, 1, _pack(ends)).documents
    assert (None if found is None else found.tolist()) == expected
    assert token_order(8, 1).documents is None


def test_padded_documents() -> None:
    """Where documents are padded, tokens lie by the padded boundaries."""
    packed = _pack([0, 3, 5])
    packed.cu_seqlens_q_padded = torch.tensor([0, 4, 8], dtype=torch.int32)
    order = token_order(8, 2, packed)
    assert order.documents is not None
    assert order.documents.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert order.of_rank(0).tolist() == [0, 3, 4, 7]
    assert order.of_rank(1).tolist() == [1, 2, 5, 6]


@pytest.mark.parametrize(
    ("length", "cp", "ends", "message"),
    [
        (6, 2, None, "A row of 6 tokens with CP=2: .* needs a multiple of 4"),
        (16, 2, [0, 4, 10, 16], r"document 1 has 6, 2 has 6\. Pad .* or choose CP from 1\."),
        (24, 4, [0, 8, 12, 24], r"multiple of 8 tokens; document 1 has 4, 2 has 12\. .* 1, 2\."),
        (50, 2, list(range(0, 51, 5)), r"0 has 5, .*7 has 5 … \(10 in all\)"),
        (16, 2, [0, 8, 12], "ends at 12, the row has 16 tokens over CP=2: .* be 16.* a document"),
        (16, 2, [0, 8, 20], "cu_seqlens_q ends at 20, the row has 16 tokens"),
        (16, 1, [0, 20], r"ends at 20, the row has 16 tokens: its last entry must be 16\.$"),
        (16, 1, [4, 16], "must start at 0 and never fall; it is 4, 16"),
        (16, 1, [0, 8, 4, 16], "never fall"),
        (16, 1, [0], "must start at 0"),
    ],
)
def test_refusals(length: int, cp: int, ends: list[int] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        token_order(length, cp, None if ends is None else _pack(ends))


def test_the_boundaries_of_a_pack_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every read waits; a change in place is seen."""
    reads: list[int] = []
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> list[int]:
        reads.append(tensor.numel())
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    packed = _pack((0, 8, 24))
    orders = {id(token_order(24, 1, packed)) for _layer in range(5)}
    assert reads == [3] and len(orders) == 1
    packed.cu_seqlens_q[1] = 16
    assert token_order(24, 1, packed).boundaries == (0, 16, 24)
    with torch.inference_mode():
        inference = _pack((0, 8, 24))
        assert token_order(24, 1, inference).boundaries == (0, 8, 24)
        inference.cu_seqlens_q[1] = 16
        assert token_order(24, 1, inference).boundaries == (0, 16, 24)
