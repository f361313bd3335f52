"""The rows of a held-out split, in order: every token but the first is predicted exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from nemo_megacpp.data.indexed import IndexedTokens
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.documents import pack_row
from nemo_megacpp.side_channels import SideChannel


class HeldoutRows:
    """Rows of ``seq_length`` tokens, cut from the documents laid end to end as they are stored.

    Row ``i`` has the tokens from ``i * seq_length`` on, and predicts each one's successor. The last
    row is filled up with EOS, which counts for nothing (``loss_mask`` is 0).

    Args:
        data: opened.
        seq_length: tokens of a row.
        packed: mark the documents, as a run with ``packed_documents`` does: the model resets at
            each, and an EOS that another document follows predicts nothing.
        side_channels: whose ids the rows hold.
        most: rows to take, at most.
    """

    def __init__(
        self,
        data: PreparedData,
        seq_length: int,
        packed: bool = False,
        side_channels: Sequence[SideChannel] = (),
        most: int | None = None,
    ):
        self.data, self.seq_length, self.packed = data, seq_length, packed
        self.side_channels = tuple(side_channels)
        rows = -(-(data.splits["heldout"].tokens - 1) // seq_length)
        self._rows = rows if most is None else min(rows, most)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``tokens``, ``labels``, ``loss_mask``, ``position_ids``, ``place`` (in the row),
        ``document_start`` if packed, and the ids of side channels by their key, all ``[s]``.

        Raises:
            UserError: an id beyond the vocabulary.
        """
        start, length = index * self.seq_length, self.seq_length
        text = self._read("heldout", start, length + 1, self.data.vocab_size)
        there = len(text)
        text = np.pad(text, (0, length + 1 - there), constant_values=self.data.eos_id)
        whole = torch.from_numpy(text)
        if self.packed:
            row = pack_row(whole, self.data.eos_id)
        else:
            row = {
                "tokens": whole[:-1].contiguous(),
                "labels": whole[1:].contiguous(),
                "loss_mask": torch.ones(length),
                "position_ids": torch.arange(length),
            }
        row["loss_mask"][there - 1 :] = 0
        row["place"] = torch.arange(length)
        for channel in self.side_channels:
            ids = self._read(f"heldout.{channel.name}", start, length, channel.vocab_size)
            row[channel.key] = torch.from_numpy(np.pad(ids, (0, length - len(ids))))
        return row

    def predicted_bytes(self, bytes_of: np.ndarray) -> int:
        """Return the bytes of text that all rows predict.

        Args:
            bytes_of: of every token, ``[vocab_size]``.
        """
        total = 0
        for index in range(len(self)):
            row = self[index]
            counts = row["labels"][row["loss_mask"] > 0].numpy()
            total += int(bytes_of[counts].sum())
        return total

    @cached_property
    def _ends(self) -> np.ndarray:
        lengths = IndexedTokens.open(self.data.heldout_prefix).lengths
        return np.cumsum(lengths, dtype=np.int64)

    def _read(self, name: str, start: int, count: int, vocab_size: int) -> np.ndarray:
        """Return up to ``count`` ids of a split from its ``start``-th on, int64."""
        indexed, ends = IndexedTokens.open(self.data.root / name), self._ends
        parts: list[np.ndarray] = []
        document = int(np.searchsorted(ends, start, side="right"))
        offset = start - int(ends[document] - indexed.lengths[document])
        while count > 0 and document < len(ends):
            part = indexed.document(document, limit=offset + count)[offset:]
            parts.append(part)
            count, offset, document = count - len(part), 0, document + 1
        ids = np.concatenate(parts).astype(np.int64)
        if ids.min() < 0 or ids.max() >= vocab_size:
            wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
            raise UserError(
                f"{name} of {self.data.root} has the id {wrong}, but vocab_size={vocab_size}: the "
                f"data are damaged. Find all damage: nemo-megacpp data verify {self.data.root}"
            )
        return ids
