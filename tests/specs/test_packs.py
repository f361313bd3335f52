"""What a stack refuses of packed rows, and that it accepts what is right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import mamba_context_parallel
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer

from nemo_megacpp.errors import UserError
from nemo_megacpp.specs.packs import check_packs

A = SimpleNamespace(self_attention=mock.Mock(spec=SelfAttention))
E = SimpleNamespace(mlp=mock.Mock(spec=MoELayer))
M = SimpleNamespace(mixer=mock.Mock(spec=MambaMixer))
ENDS = [0, 8, 12, 32]


def _check(
    layers: list[Any],
    cp: int = 2,
    *,
    tp: int = 1,
    share: int = 16,
    rows: int = 1,
    rotary: int | None = 20,
    capacity: float | None = None,
    ends: list[int] = ENDS,
    **fields: Any,
) -> None:
    boundaries = torch.tensor(ends, dtype=torch.int32)
    known: dict[str, Any] = {"qkv_format": "thd", "max_seqlen_q": 20, "max_seqlen_kv": 20}
    packed = PackedSeqParams(cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, **known | fields)
    config: Any = SimpleNamespace(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        moe_expert_capacity_factor=capacity,
    )
    check_packs(packed, torch.empty(share, rows, 1), rotary, layers, config, cp)


def test_what_is_right() -> None:
    with mock.patch.object(mamba_context_parallel, "tex", object()):
        _check([A, E, M])
        _check([A, E, M], tp=2, share=8)
    _check([A, E], 1, share=32, capacity=1.0)
    # Without Transformer Engine, and with no document that a rotary embedding would have to turn.
    with mock.patch.object(mamba_context_parallel, "tex", None):
        _check([M], 1, share=32, rotary=4, ends=[0, 8])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"qkv_format": "sbhd"}, "must have qkv_format='thd', got 'sbhd'"),
        ({"rows": 2}, "one row; this one has 2. Set micro_batch_size=1"),
        ({"local_cp_size": 2}, r"local_cp_size=2\); the hybrid stack has one CP=2"),
        ({"share": 8}, "ends at 32, the row has 16 tokens"),
        ({"share": 8, "tp": 4}, "ends at 32, the row has 64 tokens over CP=2"),
        ({"ends": [0, 8, 14, 32]}, "document 1 has 6, 2 has 18"),
        ({"rotary": 12}, "max_seqlen_q=20, .* has 20 tokens: set max_seqlen_q to at least 20"),
        ({"cp": 1, "share": 40}, "end at token 32 and its row has 40: .* 8 tokens beyond"),
        ({"capacity": 1.5}, "CP=2 and moe_expert_capacity_factor=1.5"),
        ({}, "CP=2: Megatron's MambaMixer .* Transformer Engine >= 1.10"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with (
        mock.patch.object(mamba_context_parallel, "tex", None),
        pytest.raises(UserError, match=message),
    ):
        _check([A, E, M], **given)
