"""The torch core attention against a softmax written out, on packs, and under CP."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnMaskType

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.core_attention import TorchCoreAttention
from nemo_megacpp.mixers.sequence_layout import token_order
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import make_config
from tests.selection import slow_if

HEADS, GROUPS, DIM = 28, 4, 5
TOLERANCE = 1e-13
"""Of the largest value, in float64."""

Ends = list[int] | None


def _random(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _inputs(length: int, ends: Ends, batch: int) -> list[torch.Tensor]:
    """Return query, key, value and the form of the output; packs are ``[t, n, d]``."""
    middle = () if ends is not None else (batch,)
    query = _random(0, length, *middle, HEADS, DIM)
    key, value = (_random(seed, length, *middle, GROUPS, DIM) for seed in (1, 2))
    return [query, key, value, _random(3, length, *middle, HEADS * DIM)]


def _naive(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, ends: Ends
) -> torch.Tensor:
    """Row by row, head by head: each token looks at its document up to itself."""
    length = query.size(0)
    starts = torch.tensor([0] * length)
    for start in ends or []:
        starts[start:] = start
    heads = []
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        rows = []
        for t in range(length):
            seen = slice(int(starts[t]), t + 1)
            scores = (query[t, ..., head, :] * key[seen, ..., group, :]).sum(-1) * scale
            weights = torch.softmax(scores, dim=0)
            rows.append((weights[..., None] * value[seen, ..., group, :]).sum(0))
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=-1)


def _values(
    output: torch.Tensor, inputs: list[torch.Tensor], form: torch.Tensor
) -> list[np.ndarray]:
    gradients = torch.autograd.grad((output * form).sum(), inputs)
    return [value.numpy() for value in (output.detach(), *gradients)]


def _by_hand(length: int, ends: Ends, batch: int, scale: float | None) -> list[np.ndarray]:
    *inputs, form = _inputs(length, ends, batch)
    inputs = [t.requires_grad_() for t in inputs]
    query, key, value = inputs
    return _values(_naive(query, key, value, scale or DIM**-0.5, ends), inputs, form)


def _pack(ends: Ends) -> PackedSeqParams | None:
    if ends is None:
        return None
    boundaries = torch.tensor(ends, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)


def _attend(
    cp: int, length: int, ends: Ends, batch: int, scale: float | None, exchange: str | None = None
) -> list[np.ndarray]:
    """On a rank: the module on this rank's share; output and gradients of q, k and v."""
    layout = ParallelLayout.parse(f"cp={cp}")
    start_model_parallel(layout)
    config = make_config(StepSpec(tiny_model("A"), dtype="float64"), layout)
    attention = TorchCoreAttention(
        config, 1, AttnMaskType.causal, "self", softmax_scale=scale, cp_comm_type=exchange
    )
    packed = _pack(ends)
    mine = token_order(length, cp, packed).of_rank(attention.cp_group.rank())
    *inputs, form = (t[mine] for t in _inputs(length, ends, batch))
    inputs = [t.requires_grad_() for t in inputs]
    query, key, value = inputs
    output = attention(query, key, value, None, packed_seq_params=packed)
    return _values(output, inputs, form)


CASES: list[tuple[int, int, Ends, int, float | None]] = [
    *((cp, 16, None, 2, None) for cp in (1, 2, 4)),
    *((cp, 16, None, 1, 0.7) for cp in (1, 2, 4)),
    *((cp, 16, [0, 16], 1, None) for cp in (1, 2, 4)),
    (1, 16, [0, 5, 12, 16], 1, 0.7),
    (1, 16, [0, 1, 2, 15], 1, None),
    (2, 28, None, 3, None),
    (2, 16, [0, 4, 12, 16], 1, 0.7),
    (2, 16, [0, 4, 4, 8, 12, 16], 1, None),
    (3, 42, None, 2, None),
    (3, 42, [0, 18, 24, 42], 1, 0.7),
    (4, 16, [0, 8, 16], 1, 0.7),
]
"""CP, length, ends of documents, rows, softmax scale."""


@pytest.mark.parametrize(
    ("cp", "length", "ends", "batch", "scale", "exchange"),
    [
        pytest.param(*case, exchange, marks=slow_if(exchange is not None and case[2] is None))
        for case in CASES
        for exchange in (None, "all_gather", "a2a")
        if exchange is None or (case[0] > 1 and (exchange != "a2a" or GROUPS % case[0] == 0))
    ],
)
def test_against_softmax(
    ranks: WorkerPool,
    cp: int,
    length: int,
    ends: Ends,
    batch: int,
    scale: float | None,
    exchange: str | None,
) -> None:
    """Output and the gradients of query, key and value; ranks hold zigzag slices of them."""
    shares = ranks.run(cp, _attend, cp, length, ends, batch, scale, exchange)
    expected = _by_hand(length, ends, batch, scale)
    order = token_order(length, cp, _pack(ends))
    for name, value, *parts in zip(
        ("output", "query", "key", "value"), expected, *shares, strict=True
    ):
        for rank, part in enumerate(parts):
            mine = value[order.of_rank(rank).numpy()]
            assert part.shape == mine.shape, name
            assert abs(part - mine).max() <= TOLERANCE * abs(value).max(), (name, rank)


def test_the_ring_repeats_bit_for_bit(ranks: WorkerPool) -> None:
    first, second = (ranks.run(4, _attend, 4, 48, [0, 8, 48], 1, None) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _dropped(exchange: str) -> list[np.ndarray]:
    """On a rank: two passes with attention dropout from the same random state, and one without."""
    layout = ParallelLayout.parse("cp=2")
    start_model_parallel(layout)
    config = make_config(StepSpec(tiny_model("A", attention_dropout=0.3), dtype="float64"), layout)
    attention = TorchCoreAttention(config, 1, AttnMaskType.causal, "self", cp_comm_type=exchange)
    mine = token_order(64, 2).of_rank(attention.cp_group.rank())
    *inputs, _ = (t[mine] for t in _inputs(64, None, 2))
    found = []
    for training in (True, True, False):
        torch.manual_seed(3)
        model_parallel_cuda_manual_seed(3, force_reset_rng=True)
        attention.train(training)
        found.append(attention(*inputs, None).numpy())
    return found


@pytest.mark.parametrize("exchange", ["p2p", "all_gather", "a2a"])
def test_dropout(ranks: WorkerPool, exchange: str) -> None:
    """On in training, alike from one random state, and right on average."""
    for one, again, without in ranks.run(2, _dropped, exchange):
        assert np.array_equal(one, again)
        assert abs(one - without).max() > 0.1
        assert abs((one - without).mean()) < 0.02


def test_documents_do_not_see_each_other(ranks: WorkerPool) -> None:
    """The two masks differ where they must: this fails if a pack is taken for one document."""
    whole = ranks.run(1, _attend, 1, 16, [0, 16], 1, None)[0][0]
    packs = ranks.run(1, _attend, 1, 16, [0, 5, 16], 1, None)[0][0]
    assert abs(whole[:5] - packs[:5]).max() <= TOLERANCE
    assert abs(whole[5:] - packs[5:]).max(axis=1).min() > 1e-3


def _split_over_cp(exchange: str) -> str:
    layout = ParallelLayout.parse("cp=4")
    start_model_parallel(layout)
    config = make_config(StepSpec(tiny_model("A", num_query_groups=2)), layout)
    try:
        TorchCoreAttention(config, 1, AttnMaskType.causal, "self", cp_comm_type=exchange)
    except UserError as error:
        return str(error)
    return ""


def test_too_few_heads_to_exchange(ranks: WorkerPool) -> None:
    for message in ranks.run(4, _split_over_cp, "a2a"):
        assert "the 2 KV heads of a rank over CP=4" in message
    assert ranks.run(4, _split_over_cp, "p2p") == [""] * 4


@pytest.mark.parametrize(
    ("changes", "mask", "message"),
    [
        ({}, AttnMaskType.padding, "is causal; the spec asks for padding"),
        ({"window_size": (4, 0)}, AttnMaskType.causal, r"window_size=\(4, 0\)"),
        ({"softmax_type": "off-by-one"}, AttnMaskType.causal, "softmax_type='off-by-one'"),
    ],
)
def test_refusals(changes: dict[str, Any], mask: AttnMaskType, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TorchCoreAttention(HybridConfig(**tiny_model("A"), **changes), 1, mask, "self")
