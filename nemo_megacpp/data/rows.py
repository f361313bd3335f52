"""Which documents lie in the rows that a model trains on, for people."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from nemo_megacpp.data.indexed import IndexedTokens
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset


@dataclass(frozen=True)
class Piece:
    """A document's part in a row.

    Attributes:
        start, stop: positions in the row.
        document: its number in the split.
        offset: where in the document the part begins, in tokens.
        ids: tokens, filling included.
    """

    start: int
    stop: int
    document: int
    offset: int
    ids: list[int]


@dataclass(frozen=True)
class Row:
    """A row of ``seq_length`` tokens, and what lies in it, by position."""

    number: int
    pieces: list[Piece]


def read_rows(data: PreparedData, count: int, seq_length: int, seed: int = 1234) -> Iterator[Row]:
    """Read the first rows of one epoch through Megatron's dataset; boundaries by the index.

    A run draws the same rows from the same seed as long as it takes no more than one epoch.

    Args:
        data: opened.
        count: rows to read, at most.
        seq_length: tokens of a row.
        seed: of the order.

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
            pieces, start = [], 0
            for document in numbers.tolist():
                stop = min(start + int(lengths[document]) - int(offset), seq_length)
                if stop > start:  # the last document may give only the label of the last token
                    ids = text[start:stop].tolist()
                    pieces.append(Piece(start, stop, document, int(offset), ids))
                start, offset = stop, 0
            yield Row(number, pieces)


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
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    from nemo_megacpp.data.packed_rows import PackedDocuments

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
