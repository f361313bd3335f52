"""Megatron's Mamba mixer as we derive it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_mixer import MambaMixer

from nemo_megacpp.core.layers import PACK_NUMBERS_DOCUMENTS
from nemo_megacpp.mixers.mamba2_mixer import Mamba2Mixer


@pytest.mark.parametrize("ends", [(0, 5, 7, 11), (0, 5, 5, 16), (0, 16), (0, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_documents_are_numbered_as_megatron_does(ends: tuple[int, ...], padded: bool) -> None:
    bounds = torch.tensor(ends, dtype=torch.int32)
    fields: dict[str, Any] = {
        "qkv_format": "thd",
        "cu_seqlens_q": bounds[:1] if padded else bounds,
        "cu_seqlens_q_padded": bounds if padded else None,
    }
    packed = PackedSeqParams(**fields)
    nobody: Any = None  # neither form reads the module
    if PACK_NUMBERS_DOCUMENTS:
        expected = PackedSeqParams(**fields, total_tokens=16).seq_idx
    else:
        expected = MambaMixer._create_packed_seq_idx(nobody, packed, 16)
    found = Mamba2Mixer._create_packed_seq_idx(nobody, packed, 16)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
