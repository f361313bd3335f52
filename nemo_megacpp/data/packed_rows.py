"""Training rows that keep their documents apart.

Megatron's ``GPTDataset`` lays shuffled documents end to end and cuts rows of ``seq_length`` tokens
from that, so a row holds pieces of several documents. In prepared data every document ends in EOD
and no text is encoded as one, so a row shows the boundaries of the index by itself: a document
begins after EOD (after a run of them, because ``data prepare --document-multiple`` pads with EOD).
"""

from __future__ import annotations

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

from nemo_megacpp.mixers.documents import pack_row


class PackedDocuments(GPTDataset):
    """``GPTDataset`` that marks where documents begin; the tokens of every row are the same.

    What Megatron's ``reset_position_ids`` and ``eod_mask_loss`` ask for is done too: positions
    count from the start of a document, and EOD, after which another document follows, has no loss.
    A sample has, beside ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, the mask
    ``document_start``, all ``[s]``; in a step the marks become ``PackedSeqParams``
    (:func:`nemo_megacpp.mixers.documents.packed_seq_params`).
    """

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        text, _ = self._query_document_sample_shuffle_indices(0 if idx is None else idx)
        row = pack_row(torch.from_numpy(text).long(), self.config.tokenizer.eod)
        if idx is None:  # a row that fills up a batch
            row["loss_mask"].zero_()
        return row
