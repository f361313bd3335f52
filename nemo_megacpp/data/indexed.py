"""Read and check Megatron's `.bin/.idx` pair with numpy alone.

Layout after megatron/core/datasets/indexed_dataset.py (version 1). Megatron's own reader costs
seconds of imports and finds a truncated `.bin` only in the middle of a run.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_megacpp.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {4: np.int32, 8: np.uint16}


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Return the type that Megatron stores ids in (its ``DType.optimal_dtype``)."""
    return np.uint16 if vocab_size < 65500 else np.int32


@dataclass(frozen=True)
class IndexedTokens:
    """Token ids of one split, one sequence a document.

    Attributes:
        path: of the ``.bin``.
        dtype: of a token id.
        lengths: tokens of each document, EOS included: int32 ``[documents]``.
        offsets: bytes before each document in the file: int64 ``[documents]``. Documents may be
            left out of an index, and several indices may share one file.
    """

    path: Path
    dtype: type[np.generic]
    lengths: np.ndarray
    offsets: np.ndarray

    @classmethod
    def open(cls, prefix: str | Path) -> IndexedTokens:
        """Open ``prefix.bin`` and ``prefix.idx``.

        Raises:
            UserError: A file is missing or unreadable, is not of this format, has documents of
                several sequences, or has another size than the index says.
        """
        index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        try:
            for path in (index, data):
                if not stat.S_ISREG(path.stat().st_mode):
                    raise UserError(f"{path} is not a regular file.")
            raw, data_size = index.read_bytes(), data.stat().st_size
        except OSError as error:
            raise UserError(f"Cannot read {error.filename!r}: {error.strerror}.") from error
        if len(raw) < _HEADER.size:
            raise UserError(f"{index} is truncated: {len(raw)} bytes, less than its header.")
        magic, version, code, sequences, documents = _HEADER.unpack_from(raw)
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise UserError(f"{index} is not a Megatron index of token ids (version 1).")
        # Per sequence an int32 length and an int64 offset, then an int64 per document boundary.
        expected = _HEADER.size + 12 * sequences + 8 * documents
        if len(raw) != expected:
            raise UserError(f"{index} has {len(raw):,} bytes; its header says {expected:,}.")
        if documents != sequences + 1:
            raise UserError(
                f"{index} has {sequences:,} sequences in {max(documents - 1, 0):,} documents; "
                f"here a document is one sequence (preprocess_data.py without --split-sentences)."
            )
        dtype = _DTYPES[code]
        lengths = np.frombuffer(raw, np.int32, sequences, _HEADER.size)
        offsets = np.frombuffer(raw, np.int64, sequences, _HEADER.size + lengths.nbytes)
        boundaries = np.frombuffer(raw, np.int64, documents, len(raw) - 8 * documents)
        itemsize = np.dtype(dtype).itemsize
        if (
            min(lengths.min(initial=0), offsets.min(initial=0)) < 0
            or offsets.max(initial=0) > 2**62  # their ends would overflow
            or (offsets % itemsize).any()
            or not np.array_equal(boundaries, np.arange(documents))
        ):
            raise UserError(f"{index} is damaged: its lengths, offsets or boundaries are invalid.")
        sizes = lengths.astype(np.int64) * itemsize
        expected = int((offsets + sizes).max(initial=0))
        # A link leads to a file that other indices share.
        if data_size < expected or (data_size > expected and not data.is_symlink()):
            raise UserError(f"{data} has {data_size:,} bytes; its index says {expected:,}.")
        return cls(data, dtype, lengths, offsets)

    @property
    def tokens(self) -> int:
        """All tokens, EOS included."""
        return int(self.lengths.sum(dtype=np.int64))

    def document(self, number: int, limit: int | None = None) -> np.ndarray:
        """Return the first ``limit`` token ids of a document: [tokens]."""
        length = int(self.lengths[number])
        count = length if limit is None else min(length, limit)
        return np.fromfile(self.path, self.dtype, count=count, offset=int(self.offsets[number]))


def write_index(
    path: Path, dtype: type[np.generic], lengths: np.ndarray, offsets: np.ndarray | None = None
) -> None:
    """Write an index as Megatron's ``IndexedDatasetBuilder`` does, one sequence a document.

    Args:
        path: of the ``.idx``.
        dtype: of a token id in the ``.bin``.
        lengths: tokens of each document, ``[documents]``.
        offsets: bytes before each document, ``[documents]``; default one after the other, the only
            order that Megatron's builder can write.
    """
    if offsets is None:
        offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    code = next(code for code, known in _DTYPES.items() if known is dtype)
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype(np.int32).tobytes())
        file.write(offsets.astype(np.int64).tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
