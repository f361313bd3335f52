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

from nemo_megacpp.data.corpus import Document, Reading, Tally
from nemo_megacpp.data.documents import iter_documents
from nemo_megacpp.data.indexed import IndexedTokens, token_dtype, write_index
from nemo_megacpp.data.shards import Shard
from nemo_megacpp.data.side_channels import document_ids
from nemo_megacpp.data.split import SPLITS, Split, SplitPlan, hash_documents
from nemo_megacpp.data.staging import sync
from nemo_megacpp.data.tokenizer import LoadedTokenizer, load_tokenizer
from nemo_megacpp.side_channels import SideChannel

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
    """Write the tokens of a shard, and the ids of its side channels, into its `part_folder`, which
    is complete or missing.

    Documents end in as many EOS as make their length a multiple of ``document_multiple``.
    """
    part = part_folder(parts, shard)
    begun = part.with_name(f".{part.name}-{os.getpid()}")
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    loaded = load_tokenizer(tokenizer, tried=True)
    lengths: dict[Split, list[int]] = {split: [] for split in SPLITS}
    padding = dict.fromkeys(SPLITS, 0)
    streams = [(split, channel) for split in SPLITS for channel in (None, *reading.side_channels)]
    files = {which: (begun / f"{stream_name(*which)}.bin").open("wb") for which in streams}
    for batch in _batches(iter_documents(shard.files, reading), plan):
        encoded = _encode(loaded, [document for _, document in batch])
        for (split, document), (found, places) in zip(batch, encoded, strict=True):
            filling = -(len(found) + 1) % document_multiple
            ids = np.array([*found, *[loaded.eos_id] * (1 + filling)], dtype)
            files[split, None].write(ids.tobytes())
            for channel in reading.side_channels:
                beside = document_ids(channel, document.values, ids, places)
                kind = token_dtype(channel.vocab_size)
                files[split, channel].write(beside.astype(kind).tobytes())
            lengths[split].append(len(ids))
            padding[split] += filling
    for (split, stream), file in files.items():
        file.close()
        stored = dtype if stream is None else token_dtype(stream.vocab_size)
        index = begun / f"{stream_name(split, stream)}.idx"
        write_index(index, stored, np.array(lengths[split], np.int32))
    content = np.array([padding[split] for split in SPLITS], np.int64).tobytes()
    (begun / "padding").write_bytes(content)
    for path in begun.iterdir():
        sync(path)
    begun.rename(part)


def stream_name(split: Split, channel: SideChannel | None) -> str:
    """Return the file name, without ``.bin``, of a split's tokens (None) or of a side channel."""
    return split if channel is None else f"{split}.{channel.name}"


def _encode(
    loaded: LoadedTokenizer, documents: Sequence[Document]
) -> list[tuple[list[int], list[int]]]:
    """Return the ids of every document, and the first character of each id where it is needed."""
    texts = [document.text for document in documents]
    if any(isinstance(value, list) for document in documents for value in document.values.values()):
        return loaded.encode_with_places(texts)
    return [(ids, []) for ids in loaded.encode(texts)]


def part_folder(parts: Path, shard: Shard) -> Path:
    """Return the folder that holds the tokens of a shard, once they are complete."""
    return parts / f"{shard.number:06}"


def join_parts(
    parts: Path,
    shards: Sequence[Shard],
    dtype: type[np.generic],
    out: Path,
    side_channels: Sequence[SideChannel] = (),
) -> dict[Split, tuple[int, int]]:
    """Write ``train`` and ``heldout``, and their side channels, in ``.bin/.idx`` from all parts, in
    order.

    Returns:
        Tokens of each split, and how many of them are padding.

    Raises:
        UserError: a part is damaged.
    """
    folders = [part_folder(parts, shard) for shard in shards]
    padding = np.sum([np.fromfile(folder / "padding", np.int64) for folder in folders], axis=0)
    counts: dict[Split, tuple[int, int]] = {}
    for number, split in enumerate(SPLITS):
        lengths = _join(folders, split, dtype, out)
        for channel in side_channels:
            name = stream_name(split, channel)
            beside = _join(folders, name, token_dtype(channel.vocab_size), out)
            assert np.array_equal(beside, lengths), "every id stands beside a token"
        counts[split] = int(lengths.sum(dtype=np.int64)), int(padding[number])
    return counts


def _join(folders: list[Path], name: str, dtype: type[np.generic], out: Path) -> np.ndarray:
    """Write one pair of files, and return the lengths of its documents."""
    lengths = []
    with (out / f"{name}.bin").open("wb") as joined:
        for folder in folders:
            part = IndexedTokens.open(folder / name)
            lengths.append(part.lengths)
            with part.path.open("rb") as file:
                shutil.copyfileobj(file, joined, 1 << 20)
    whole: np.ndarray = np.concatenate(lengths)
    write_index(out / f"{name}.idx", dtype, whole)
    return whole


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
