"""Training rows and their documents.

Megatron's ``GPTDataset`` lays shuffled documents end to end and cuts rows of ``seq_length`` tokens
from that, so a row holds parts of several documents. In prepared data every document ends in EOD
and no text is encoded as one, so the boundaries can be read from a row itself: a document begins
after EOD (after a run of them, because ``data prepare --document-multiple`` pads with EOD).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from nemo_megacpp.data.indexed import IndexedTokens
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.documents import pack_row


class PackedDocuments(GPTDataset):
    """``GPTDataset`` that marks where documents begin; the tokens of every row are the same.

    As with Megatron's ``reset_position_ids`` and ``eod_mask_loss``, positions count from the start
    of a document, and an EOD that another document follows has no loss. A sample has, beside
    ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, the mask ``document_start``, all
    ``[s]``; in a step the marks become ``PackedSeqParams``
    (:func:`nemo_megacpp.mixers.documents.packed_seq_params`).
    """

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        text, _ = self._query_document_sample_shuffle_indices(0 if idx is None else idx)
        row = pack_row(torch.from_numpy(text).long(), self.config.tokenizer.eod)
        if idx is None:  # a row that fills up a batch
            row["loss_mask"].zero_()
        return row


class DocumentPart(NamedTuple):
    """A document's part in a row.

    Attributes:
        start, stop: positions in the row.
        document: its number in the split.
        offset: first token of the part, counted in the document.
        ids: tokens, padding included.
    """

    start: int
    stop: int
    document: int
    offset: int
    ids: list[int]


def read_rows(
    data: PreparedData, count: int, seq_length: int, seed: int = 1234
) -> Iterator[list[DocumentPart]]:
    """Read the first rows of one epoch through Megatron's dataset, with boundaries by the index.

    A run of at most one epoch draws the same rows from the same seed.

    Args:
        data: opened.
        count: rows to read, at most.
        seq_length: tokens of a row.
        seed: of the order.

    Yields:
        The parts of a row, by position.

    Raises:
        UserError: rows longer than the split.
    """
    if not 0 < seq_length < data.tokens:
        raise UserError(
            f"A row of {seq_length:,} tokens: the train split of {data.root} has {data.tokens:,}, "
            f"and a row needs one more than its own."
        )
    lengths = IndexedTokens.open(data.train_prefix).lengths
    with tempfile.TemporaryDirectory() as cache:  # inspecting writes nothing beside the data
        dataset = open_epoch(data, seq_length, seed, cache)
        for number in range(min(count, len(dataset))):
            text, numbers = dataset._query_document_sample_shuffle_indices(number)
            first, offset = dataset.sample_index[dataset.shuffle_index[number]]
            assert numbers[0] == dataset.document_index[first]
            parts, start = [], 0
            for document in numbers.tolist():
                stop = min(start + int(lengths[document]) - int(offset), seq_length)
                if stop > start:  # the last document may give only the label of the last token
                    ids = text[start:stop].tolist()
                    parts.append(DocumentPart(start, stop, document, int(offset), ids))
                start, offset = stop, 0
            yield parts


def open_epoch(
    data: PreparedData, seq_length: int, seed: int, cache: str, packed: bool = False
) -> GPTDataset:
    """Open one epoch of the train split as rows of ``seq_length`` tokens.

    Args:
        data: opened.
        seq_length: tokens of a row.
        seed: of the order.
        cache: folder for the index that Megatron builds.
        packed: mark the documents, as a run with ``packed_documents`` does.
    """
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=SimpleNamespace(
            vocab_size=data.vocab_size,
            eod=data.eos_id,
            unique_identifiers={"fingerprint": data.tokenizer_fingerprint},
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(data.train_prefix)
    documents = np.arange(GPTDataset.numel_low_level_dataset(indexed))
    kind = PackedDocuments if packed else GPTDataset
    return kind(indexed, data.train_prefix, documents, None, Split.train, config)
