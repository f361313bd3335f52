"""Rows that pack several documents: where they begin, as masks and for Megatron's modules."""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_megacpp.errors import UserError


def pack_row(text: torch.Tensor, eod: int) -> dict[str, torch.Tensor]:
    """Return the sample of the token ids ``text`` ``[s + 1]``.

    See :class:`nemo_megacpp.data.packed_rows.PackedDocuments`.
    """
    tokens, labels = text[:-1].contiguous(), text[1:].contiguous()
    ends = tokens == eod
    begins = torch.ones_like(ends)
    begins[1:] = ends[:-1] & ~ends[1:]
    starts = begins.nonzero().flatten()
    document = begins.cumsum(0) - 1
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (~ends).float(),
        "position_ids": torch.arange(len(tokens)) - starts[document],
        "document_start": begins,
    }


def packed_seq_params(document_start: torch.Tensor) -> PackedSeqParams:
    """Return the documents of a row for Megatron's modules.

    Args:
        document_start: ``[1, s]``, true where a document begins; on the CPU (its sums are read).

    Raises:
        UserError: a microbatch of several rows.
    """
    rows, length = document_start.shape
    if rows != 1:
        raise UserError(
            f"A microbatch of packed documents is one row; this one has {rows}. Set "
            f"micro_batch_size=1; global_batch_size may stay."
        )
    starts = document_start[0].nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([length])]).to(torch.int32)
    longest = int(ends.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
