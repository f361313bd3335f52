"""The three passes over a shard: survey it, sample it, encode it.

Each reads one shard alone, so several processes can share the work. Their results are joined in the
order of the shards, so the number of processes changes nothing in the output.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nemo_megacpp.data.corpus import Document, Reading, Tally, iter_documents
from nemo_megacpp.data.indexed import IndexedTokens, write_index
from nemo_megacpp.data.shards import Shard
from nemo_megacpp.data.split import SPLITS, Split, SplitPlan, hash_documents
from nemo_megacpp.data.staging import sync
from nemo_megacpp.data.tokenizer import load_tokenizer

_BATCH_BYTES = 1 << 22


def survey(reading: Reading, shard: Shard) -> tuple[np.ndarray, Tally]:
    """Return the hashes and sizes of the shard's documents, and what was left out."""
    tally = Tally()
    return hash_documents(iter_documents(shard.files, reading, tally)), tally


def sample(reading: Reading, plan: SplitPlan, shard: Shard) -> list[str]:
    """Return the texts of a shard that a BPE is trained on."""
    documents = iter_documents(shard.files, reading)
    return [document.text for document in documents if plan.trains_tokenizer(document.key)]


def encode(
    reading: Reading,
    plan: SplitPlan,
    tokenizer: Path,
    dtype: type[np.generic],
    document_multiple: int,
    parts: Path,
    shard: Shard,
) -> None:
    """Write the tokens of a shard into its `part_folder`, which is complete or missing.

    Documents end in as many EOS as make their length a multiple of ``document_multiple``.
    """
    part = part_folder(parts, shard)
    begun = part.with_name(f".{part.name}-{os.getpid()}")
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    loaded = load_tokenizer(tokenizer, tried=True)
    lengths: dict[Split, list[int]] = {split: [] for split in SPLITS}
    padding = dict.fromkeys(SPLITS, 0)
    files = {split: (begun / f"{split}.bin").open("wb") for split in SPLITS}
    for batch in _batches(iter_documents(shard.files, reading), plan):
        texts = [document.text for _, document in batch]
        for (split, _), found in zip(batch, loaded.encode(texts), strict=True):
            filling = -(len(found) + 1) % document_multiple
            ids = [*found, *[loaded.eos_id] * (1 + filling)]
            files[split].write(np.array(ids, dtype).tobytes())
            lengths[split].append(len(ids))
            padding[split] += filling
    for split, file in files.items():
        file.close()
        write_index(begun / f"{split}.idx", dtype, np.array(lengths[split], np.int32))
    content = np.array([padding[split] for split in SPLITS], np.int64).tobytes()
    (begun / "padding").write_bytes(content)
    for path in begun.iterdir():
        sync(path)
    begun.rename(part)


def part_folder(parts: Path, shard: Shard) -> Path:
    """Return the folder that holds the tokens of a shard, once they are complete."""
    return parts / f"{shard.number:06}"


def join_parts(
    parts: Path, shards: Sequence[Shard], dtype: type[np.generic], out: Path
) -> dict[Split, tuple[int, int]]:
    """Write ``train`` and ``heldout`` in ``.bin/.idx`` from all parts, in order.

    Returns:
        Tokens of each split, and how many of them are padding.

    Raises:
        UserError: a part is damaged.
    """
    folders = [part_folder(parts, shard) for shard in shards]
    padding = np.sum([np.fromfile(folder / "padding", np.int64) for folder in folders], axis=0)
    counts: dict[Split, tuple[int, int]] = {}
    for number, split in enumerate(SPLITS):
        lengths = []
        with (out / f"{split}.bin").open("wb") as joined:
            for folder in folders:
                part = IndexedTokens.open(folder / split)
                lengths.append(part.lengths)
                with part.path.open("rb") as file:
                    shutil.copyfileobj(file, joined, 1 << 20)
        joined_lengths = np.concatenate(lengths)
        write_index(out / f"{split}.idx", dtype, joined_lengths)
        counts[split] = int(joined_lengths.sum(dtype=np.int64)), int(padding[number])
    return counts


def _batches(
    documents: Iterable[Document], plan: SplitPlan
) -> Iterator[list[tuple[Split, Document]]]:
    """Group documents so that tokenizers can use all cores on bounded memory."""
    batch: list[tuple[Split, Document]] = []
    size = 0
    for document in documents:
        split = plan.split(document.key)
        if split is None:
            continue
        batch.append((split, document))
        size += document.size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
