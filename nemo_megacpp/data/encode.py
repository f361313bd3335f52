"""The three things that are done to every shard: survey it, sample it, encode it.

Each works on one shard alone, so that several processes can; their results are put together in the
order of the shards, so how many processes there were does not show.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_megacpp.data.corpus import Document, iter_documents
from nemo_megacpp.data.shards import Shard
from nemo_megacpp.data.split import SPLITS, Places, Split, SplitPlan
from nemo_megacpp.data.tokenizer import load_tokenizer
from nemo_megacpp.errors import UserError

_BATCH_BYTES = 1 << 22
_PART = "part.json"


@dataclass(frozen=True)
class Reading:
    """How documents are read; see `iter_documents`."""

    text_key: str
    max_document_bytes: int

    def documents(self, shard: Shard, counts: Counter[str] | None = None) -> Iterator[Document]:
        """Read a shard."""
        return iter_documents(
            shard.files,
            text_key=self.text_key,
            max_document_bytes=self.max_document_bytes,
            counts=counts,
        )

    def survey(self, shard: Shard) -> tuple[Places, Counter[str]]:
        """Return where the shard's documents fall, and what was left out."""
        counts: Counter[str] = Counter()
        return Places.of(self.documents(shard, counts)), counts


@dataclass(frozen=True)
class Sampling:
    """The texts of a shard that a BPE is trained on."""

    reading: Reading
    plan: SplitPlan

    def __call__(self, shard: Shard) -> list[str]:
        documents = self.reading.documents(shard)
        return [d.text for d in documents if self.plan.trains_tokenizer(d.key)]


@dataclass(frozen=True)
class Encoding:
    """Writes the tokens of a shard into a folder of its own, which is there whole or not at all.

    Attributes:
        reading, plan: what to read, and where it goes.
        tokenizer: folder.
        dtype: of a token id.
        document_multiple: end documents with as many EOS as make their length a multiple of this.
        parts: folder of the parts.
    """

    reading: Reading
    plan: SplitPlan
    tokenizer: Path
    dtype: type[np.generic]
    document_multiple: int
    parts: Path

    def __call__(self, shard: Shard) -> int:
        """Encode a shard; return its number of bytes on the disk."""
        part = part_folder(self.parts, shard)
        begun = part.with_name(f".{part.name}-{os.getpid()}")
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir(parents=True)
        loaded = load_tokenizer(self.tokenizer)
        lengths: dict[Split, list[int]] = {name: [] for name in SPLITS}
        padding = dict.fromkeys(SPLITS, 0)
        files = {name: (begun / f"{name}.bin").open("wb") for name in SPLITS}
        for batch in _batches(self.reading.documents(shard), self.plan):
            encodings = loaded.tokenizer.encode_batch_fast(
                [document.text for _, document in batch], add_special_tokens=False
            )
            for (name, _), encoding in zip(batch, encodings, strict=True):
                ids = [*encoding.ids, loaded.eos_id]
                more = -len(ids) % self.document_multiple
                ids += [loaded.eos_id] * more
                files[name].write(np.array(ids, self.dtype).tobytes())
                lengths[name].append(len(ids))
                padding[name] += more
        for name, file in files.items():
            _to_disk(file)
            with (begun / f"{name}.lengths").open("wb") as of_lengths:
                of_lengths.write(np.array(lengths[name], np.int32).tobytes())
                _to_disk(of_lengths)
        with (begun / _PART).open("w", encoding="utf-8") as of_padding:
            json.dump({"padding": padding}, of_padding)
            _to_disk(of_padding)
        begun.rename(part)
        return shard.size


def part_folder(parts: Path, shard: Shard) -> Path:
    """Return where the tokens of a shard are once they are all there."""
    return parts / f"{shard.number:06}"


def join_parts(
    parts: Path, shards: Iterable[Shard], dtype: type[np.generic], out: Path
) -> dict[Split, tuple[int, int]]:
    """Write ``train`` and ``heldout`` in ``.bin/.idx`` from all parts, in order.

    Returns:
        Tokens of each split, and how many of them are padding.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builders = {
        name: IndexedDatasetBuilder(str(out / f"{name}.bin"), dtype=dtype) for name in SPLITS
    }
    tokens, padding = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for shard in shards:
        folder = part_folder(parts, shard)
        told = json.loads((folder / _PART).read_text(encoding="utf-8"))
        for name, builder in builders.items():
            lengths = np.fromfile(folder / f"{name}.lengths", np.int32)
            there = (folder / f"{name}.bin").stat().st_size // np.dtype(dtype).itemsize
            if there != lengths.sum(dtype=np.int64):
                raise UserError(
                    f"{folder / name}.bin holds {there:,} tokens, and {lengths.sum():,} were "
                    f"written. Remove {parts.parent} and prepare again."
                )
            # As the builder's own add_index does, for parts that have no index.
            with (folder / f"{name}.bin").open("rb") as file:
                shutil.copyfileobj(file, builder.data_file)
            documents = len(builder.sequence_lengths)
            builder.sequence_lengths.extend(lengths.tolist())
            builder.document_indices.extend(range(documents + 1, documents + len(lengths) + 1))
            tokens[name] += int(there)
            padding[name] += told["padding"][name]
    for name, builder in builders.items():
        builder.finalize(str(out / f"{name}.idx"))
    return {name: (tokens[name], padding[name]) for name in SPLITS}


def _batches(
    documents: Iterable[Document], plan: SplitPlan
) -> Iterator[list[tuple[Split, Document]]]:
    """Group documents so that tokenizers can use all cores on bounded memory."""
    batch: list[tuple[Split, Document]] = []
    size = 0
    for document in documents:
        name = plan.split(document.key)
        if name is None:
            continue
        batch.append((name, document))
        size += document.size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _to_disk(file: object) -> None:
    """Close a file once its content would survive the machine's end."""
    file.flush()  # type: ignore[attr-defined]
    os.fsync(file.fileno())  # type: ignore[attr-defined]
    file.close()  # type: ignore[attr-defined]
