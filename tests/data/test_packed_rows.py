"""Rows that know their documents, held to the index."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_megacpp.data.indexed import IndexedTokens
from nemo_megacpp.data.packed_rows import open_epoch, read_rows
from nemo_megacpp.data.prepare import prepare
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.documents import pack_row, packed_seq_params


def test_a_row() -> None:
    # The end of a document, a whole one, one filled with two more ends, the beginning of another.
    row = pack_row(torch.tensor([5, 6, 0, 7, 0, 8, 0, 0, 0, 9, 4, 3]), eod=0)
    assert row["tokens"].tolist() == [5, 6, 0, 7, 0, 8, 0, 0, 0, 9, 4]
    assert row["labels"].tolist() == [6, 0, 7, 0, 8, 0, 0, 0, 9, 4, 3]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1]
    assert row["loss_mask"].tolist() == [1, 1, 0, 1, 0, 1, 0, 0, 0, 1, 1]
    packed = packed_seq_params(row["document_start"][None])
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 3, 5, 9, 11]
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert (packed.max_seqlen_q, packed.max_seqlen_kv, packed.qkv_format) == (4, 4, "thd")


def test_several_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r"this one has 2\. Set micro_batch_size=1"):
        packed_seq_params(torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize(("multiple", "seq_length"), [(1, 33), (8, 40)])
def test_boundaries_are_those_of_the_index(
    corpus: Path, tmp_path: Path, multiple: int, seq_length: int
) -> None:
    options = {"vocab_size": 300, "held_out": 0.3, "document_multiple": multiple}
    data = prepare([corpus], tmp_path / "out", **options, progress=False)
    lengths = IndexedTokens.open(data.train_prefix).lengths
    assert {int(length) % multiple for length in lengths} == {0}
    padding = data.splits["train"].padding
    assert (padding > 0) == (multiple > 1)

    packed = open_epoch(data, seq_length, 1, packed=True)
    plain = open_epoch(data, seq_length, 1)
    rows = list(read_rows(data, 1000, seq_length, seed=1))
    assert len(rows) == len(packed) == len(plain) > 2
    assert max(map(len, rows)) > 1
    for parts, sample, like in zip(rows, packed, plain, strict=True):
        assert torch.equal(sample["tokens"], like["tokens"])
        assert torch.equal(sample["labels"], like["labels"])
        starts = sample["document_start"].nonzero().flatten().tolist()
        assert starts == [part.start for part in parts]
        ids = [token for part in parts for token in part.ids]
        assert sample["tokens"].tolist() == ids


def test_padding_keeps_the_text(corpus: Path, prepared: PreparedData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = prepare([corpus], out, vocab_size=300, held_out=0.3, document_multiple=8, progress=False)
    for name, split in prepared.splits.items():
        other = data.splits[name]
        assert (other.documents, other.bytes) == (split.documents, split.bytes)
        assert other.tokens - other.padding == split.tokens
