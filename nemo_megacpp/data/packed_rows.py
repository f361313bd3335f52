"""Training rows and their documents.

Megatron's ``GPTDataset`` lays shuffled documents end to end and cuts rows of ``seq_length`` tokens
from that, so a row holds parts of several documents. In prepared data every document ends in EOD
and no text is encoded as one, so the boundaries can be read from a row itself: a document begins
after EOD (after a run of them, because ``data prepare --document-multiple`` pads with EOD).

Every process builds the index of its rows in memory. Megatron would save it beside the data and
load what it finds there with pickle, which runs the code of a planted file.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from nemo_megacpp.data.indexed import IndexedTokens
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.documents import pack_row
from nemo_megacpp.side_channels import SideChannel

NO_CACHE = ""
"""Megatron's ``path_to_cache`` that neither reads nor writes a file; None is beside the data."""

for _name in ("gpt_dataset", "blended_dataset"):  # they warn that they save no index
    logging.getLogger(f"megatron.core.datasets.{_name}").addFilter(
        lambda record: "path_to_cache is None" not in str(record.msg)
    )


class CheckedRows(GPTDataset):
    """``GPTDataset`` that refuses a token id beyond the vocabulary.

    With TP, Megatron embeds such an id as zeros and reports no error. The check takes about 10 µs
    per row of 4,096 tokens.

    A sample has the ids of the model's side channels too, each under
    :attr:`nemo_megacpp.side_channels.SideChannel.key`, read for the row that was cut from the
    tokens: the documents and offsets are those of the same entry of the sample index.

    Attributes:
        vocab_size: of the model; see `rows_class`.
        side_channels: of the model.
    """

    vocab_size: int
    side_channels: tuple[SideChannel, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._beside = [(channel, self._read_beside(channel)) for channel in self.side_channels]

    def _read_beside(self, channel: SideChannel) -> GPTDataset:
        """Return a dataset that cuts the same rows from the ids of a side channel."""
        rows: GPTDataset = copy.copy(self)
        rows.dataset = IndexedDataset(f"{self.dataset_path}.{channel.name}")
        rows._pad_token_id = 0
        return rows

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(idx), **self._ids_beside(0 if idx is None else idx)}

    def _ids_beside(self, idx: int) -> dict[str, torch.Tensor]:
        found = {}
        for channel, rows in self._beside:
            ids, *_ = GPTDataset._query_document_sample_shuffle_indices(rows, idx)
            if ids.min() < 0 or ids.max() >= channel.vocab_size:
                raise UserError(
                    f"The {Path(str(self.dataset_path)).name} split of "
                    f"{Path(str(self.dataset_path)).parent} has an id beyond vocab_size="
                    f"{channel.vocab_size} in side channel {channel.name}: the data are damaged."
                )
            found[channel.key] = torch.from_numpy(ids[: self.config.sequence_length]).long()
        return found

    def _query_document_sample_shuffle_indices(self, idx: int) -> Any:
        # Text, documents, and from 0.19 on the lengths of their parts.
        text, documents, *more = super()._query_document_sample_shuffle_indices(idx)
        if text.min() < 0 or text.max() >= self.vocab_size:
            raise UserError(self._describe_wrong_id(text, documents))
        return text, documents, *more

    def _describe_wrong_id(self, text: np.ndarray, documents: np.ndarray) -> str:
        found, where = int(text[(text < 0) | (text >= self.vocab_size)][0]), ""
        for document in documents.tolist():
            if (self.dataset.get(document) == found).any():
                where = f" in document {document:,}"
                break
        prefix = Path(str(self.dataset_path))
        return (
            f"The {prefix.name} split of {prefix.parent} has token id {found}{where}, but "
            f"vocab_size={self.vocab_size}: the data are damaged or of another tokenizer. Find all "
            f"damage: nemo-megacpp data verify {prefix.parent}"
        )


class PackedDocuments(CheckedRows):
    """``GPTDataset`` that marks where documents begin; the tokens of every row are the same.

    As with Megatron's ``reset_position_ids`` and ``eod_mask_loss``, positions count from the start
    of a document, and an EOD that another document follows has no loss. A sample has, beside
    ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, the mask ``document_start``, all
    ``[s]``; in a step the marks become ``PackedSeqParams``
    (:func:`nemo_megacpp.mixers.documents.packed_seq_params`).
    """

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        text, *_ = self._query_document_sample_shuffle_indices(0 if idx is None else idx)
        row = pack_row(torch.from_numpy(text).long(), self.config.tokenizer.eod)
        if idx is None:  # a row that fills up a batch
            row["loss_mask"].zero_()
        return {**row, **self._ids_beside(0 if idx is None else idx)}


def rows_class(
    vocab_size: int, packed: bool, side_channels: Sequence[SideChannel] = ()
) -> type[CheckedRows]:
    """Return the dataset's class for a model of ``vocab_size`` and ``side_channels``, with
    documents marked or not."""
    kind = PackedDocuments if packed else CheckedRows
    attributes = {"vocab_size": vocab_size, "side_channels": tuple(side_channels)}
    return type(kind.__name__, (kind,), attributes)


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
    dataset = open_epoch(data, seq_length, seed)
    for number in range(min(count, len(dataset))):
        text, numbers, *_ = dataset._query_document_sample_shuffle_indices(number)
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
    data: PreparedData,
    seq_length: int,
    seed: int,
    packed: bool = False,
    side_channels: Sequence[SideChannel] = (),
) -> GPTDataset:
    """Open one epoch of the train split as rows of ``seq_length`` tokens.

    Args:
        data: opened.
        seq_length: tokens of a row.
        seed: of the order.
        packed: mark the documents, as a run with ``packed_documents`` does.
        side_channels: whose ids the rows hold.
    """
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        split="1,0,0",
        path_to_cache=NO_CACHE,
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
    kind = rows_class(data.vocab_size, packed, side_channels)
    return kind(indexed, data.train_prefix, documents, None, Split.train, config)
