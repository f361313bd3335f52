"""Training rows that keep their documents apart.

Megatron's ``GPTDataset`` lays shuffled documents end to end and cuts rows of ``seq_length`` tokens
from that, so a row holds pieces of several documents. In prepared data every document ends in EOD
and no text is encoded as one, so a row shows the boundaries of the index by itself: a document
begins after EOD (after a run of them, because ``data prepare --document-multiple`` pads with EOD).
"""

from __future__ import annotations

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_megacpp.errors import UserError


class PackedDocuments(GPTDataset):
    """``GPTDataset`` that marks where documents begin; the tokens of every row are the same.

    What Megatron's ``reset_position_ids`` and ``eod_mask_loss`` ask for is done too: positions
    count from the start of a document, and EOD, after which another document follows, has no loss.
    A sample has, beside ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, the mask
    ``document_start``, all ``[s]``; the marks become :func:`packed_seq_params` in a step.
    """

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        text, _ = self._query_document_sample_shuffle_indices(0 if idx is None else idx)
        row = pack_row(torch.from_numpy(text).long(), self.config.tokenizer.eod)
        if idx is None:  # a row that fills up a batch
            row["loss_mask"].zero_()
        return row


def pack_row(text: torch.Tensor, eod: int) -> dict[str, torch.Tensor]:
    """Return the sample of the token ids ``text`` ``[s + 1]``; see :class:`PackedDocuments`."""
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
