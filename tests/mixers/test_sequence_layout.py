"""Who holds which tokens, against a plain construction from the whole tensor.

Values are small integers in float64, so every comparison is exact, sums of gradients included.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.sequence_layout import (
    document_ids,
    gather_sequence,
    heads_to_sequence,
    positions_of_rank,
    segments_to_zigzag,
    sequence_to_heads,
    zigzag_to_segments,
)
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool

Op = Callable[[torch.Tensor, torch.distributed.ProcessGroup], torch.Tensor]


def _whole(seed: int, cp: int) -> torch.Tensor:
    """Return ``[s, b, c]`` with three tokens per chunk and two channels per cp rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-99, 100, (6 * cp, 2, 2 * cp), generator=generator).double()


def _exchanges(cp: int) -> dict[str, bool]:
    """On a rank: what each exchange gives and sends back, against slices of the whole."""
    start_model_parallel(ParallelLayout.parse(f"cp={cp}"))
    group = parallel_state.get_context_parallel_group()
    rank, length = group.rank(), 6 * cp
    whole, form = _whole(0, cp), _whole(1, cp)
    zigzag = positions_of_rank(length, cp, rank)
    segment = torch.arange(length).chunk(cp)[rank]
    heads = torch.arange(2 * cp).chunk(cp)[rank]
    dealt = get_batch_on_this_cp_rank({"tokens": torch.arange(length)[None]})["tokens"][0]

    def holds(op: Op, before: torch.Tensor, after: torch.Tensor, sent: torch.Tensor) -> bool:
        """Whether ``op`` maps before to after, and the gradients of ``form`` back to ``sent``."""
        x = before.clone().requires_grad_()
        y = op(x, group)
        received = form[:, :, heads] if y.shape == whole[:, :, heads].shape else None
        if op is segments_to_zigzag or op is heads_to_sequence:
            received = form[zigzag]
        if op is zigzag_to_segments:
            received = form[segment]
        if op is gather_sequence:
            received = form * (rank + 1)
        assert received is not None
        (grad,) = torch.autograd.grad(y, x, received)
        return torch.equal(y, after) and torch.equal(grad, sent)

    sums = sum(range(1, cp + 1))
    share = whole[zigzag]
    return {
        "dealt": torch.equal(dealt, zigzag),
        "sequence_to_heads": holds(sequence_to_heads, share, whole[:, :, heads], form[zigzag]),
        "heads_to_sequence": holds(heads_to_sequence, whole[:, :, heads], share, form[:, :, heads]),
        "gather_sequence": holds(gather_sequence, share, whole, form[zigzag] * sums),
        "zigzag_to_segments": holds(zigzag_to_segments, share, whole[segment], form[zigzag]),
        "segments_to_zigzag": holds(segments_to_zigzag, whole[segment], share, form[segment]),
        "through heads and back": torch.equal(
            heads_to_sequence(sequence_to_heads(share, group), group), share
        ),
        "through segments and back": torch.equal(
            segments_to_zigzag(zigzag_to_segments(share, group), group), share
        ),
        "not contiguous": torch.equal(
            zigzag_to_segments(share.transpose(1, 2), group), whole[segment].transpose(1, 2)
        ),
    }


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_exchanges(ranks: WorkerPool, cp: int) -> None:
    for rank, held in enumerate(ranks.run(cp, _exchanges, cp)):
        assert all(held.values()), (rank, held)


def test_positions() -> None:
    assert positions_of_rank(5, 1, 0).tolist() == [0, 1, 2, 3, 4]
    assert positions_of_rank(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert positions_of_rank(8, 2, 1).tolist() == [2, 3, 4, 5]
    with pytest.raises(AssertionError):
        positions_of_rank(6, 2, 0)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([0, 8], [0] * 8),
        ([0, 3, 8], [0, 0, 0, 1, 1, 1, 1, 1]),
        ([0, 1, 2, 8], [0, 1, 2, 2, 2, 2, 2, 2]),
        # What follows the last boundary is a document of its own, and an empty one takes a number.
        ([0, 3, 5], [0, 0, 0, 1, 1, 2, 2, 2]),
        ([0, 3, 3, 8], [0, 0, 0, 2, 2, 2, 2, 2]),
    ],
)
def test_document_ids(ends: list[int], expected: list[int]) -> None:
    boundaries = torch.tensor(ends, dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries)
    assert document_ids(packed, 8).tolist() == expected


def test_document_ids_count_padding() -> None:
    """Where documents are padded, tokens lie by the padded boundaries."""
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=torch.tensor([0, 3, 5], dtype=torch.int32),
        cu_seqlens_q_padded=torch.tensor([0, 4, 8], dtype=torch.int32),
    )
    assert document_ids(packed, 8).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
