"""Checksums of prepared data, written last, and their verification.

A list of blocks as in a checkpoint's manifest. Adopted data list the tokens that they link to.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_megacpp.checkpoint.manifest import (
    BLOCK_BYTES,
    Block,
    File,
    digest_blocks,
    read_blocks,
    sync,
    write_blocks,
)
from nemo_megacpp.data.indexed import IndexedTokens
from nemo_megacpp.data.prepared import CHECKSUMS, PreparedData
from nemo_megacpp.data.tokenizer import load_tokenizer
from nemo_megacpp.errors import UserError

SAMPLE_BLOCKS = 16
"""Blocks of tokens, of 16 MiB, that a run reads before it starts: 256 MiB."""

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Verified:
    """What a verification has read: blocks, those that there are, bytes, and seconds."""

    blocks: int
    of: int
    bytes: int
    seconds: float


def bytes_to_read(folder: Path) -> int:
    """Return the size of all files under checksums; one that two splits share counts once."""
    names = {os.path.realpath(path) for path in folder.rglob("*") if path.is_file()}
    return sum(os.path.getsize(name) for name in names if not name.endswith(CHECKSUMS))


def write_checksums(folder: Path, advance: Advance | None = None) -> None:
    """Write the checksums of a folder whose other files are complete.

    Args:
        folder: of prepared data.
        advance: called with the number of bytes that were read.

    Raises:
        OSError: from the file system.
    """
    files: dict[str, File] = {}
    (folder / CHECKSUMS).unlink(missing_ok=True)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        if not path.is_symlink():
            sync(path)
        starts = range(0, size, BLOCK_BYTES)
        blocks = [Block(start, min(BLOCK_BYTES, size - start), "", "") for start in starts]
        files[path.relative_to(folder).as_posix()] = {"size": size, "blocks": blocks}
    digests = _digest(folder, files, advance)
    for name, file in files.items():
        file["blocks"] = [b._replace(digest=digests[name, b.offset]) for b in file["blocks"]]
    write_blocks(folder / CHECKSUMS, files)


def _digest(
    folder: Path, files: dict[str, File], advance: Advance | None
) -> dict[tuple[str, int], str]:
    """Digest every block; the splits of adopted data may share a file, which is read once."""
    first: dict[str, str] = {}
    same = {name: first.setdefault(os.path.realpath(folder / name), name) for name in files}
    wanted = [
        (name, b) for name, file in files.items() if same[name] == name for b in file["blocks"]
    ]
    visit = None if advance is None else lambda _, __, chunk: advance(len(chunk))
    found = digest_blocks(folder, wanted, visit)
    return {
        (name, block.offset): found[same[name], block.offset]
        for name, file in files.items()
        for block in file["blocks"]
    }


def verify_sample(sources: Sequence[PreparedData]) -> str:
    """Verify every small file and some blocks of tokens, others at each call.

    Returns:
        One line that says what was verified.

    Raises:
        UserError: naming what is damaged.
    """
    share = max(1, SAMPLE_BLOCKS // len(sources))
    found = [verify(data, share) for data in sources]
    blocks, of = sum(one.blocks for one in found), sum(one.of for one in found)
    folders = " ".join(str(data.root) for data in sources)
    more = "" if blocks == of else f"; all: nemo-megacpp data verify {folders}"
    seconds = sum(one.seconds for one in found)
    return f"data: verified {blocks:,} of {of:,} blocks ({seconds:.1f} s){more}"


def verify(
    data: PreparedData, sample: int | None = None, advance: Advance | None = None
) -> Verified:
    """Compare prepared data with their checksums, and their ids with the vocabulary.

    Args:
        data: opened, which has compared sizes and numbers of tokens.
        sample: blocks of tokens to read, chosen at random; None for all.
        advance: called with the number of bytes that were read.

    Raises:
        UserError: naming every file that was changed and its first block, or the first id beyond
            the vocabulary and its document.
    """
    began = time.perf_counter()
    files = _listed(data)
    tokens: list[tuple[str, Block]] = []
    wanted: list[tuple[str, Block]] = []
    seen = set()
    for name, file in files.items():
        for block in file["blocks"]:
            key = os.path.realpath(data.root / name), block
            if key not in seen:  # the splits of adopted data may share a file
                seen.add(key)
                (tokens if name.endswith(".bin") else wanted).append((name, block))
    total = len(tokens) + len(wanted)
    if sample is not None and sample < len(tokens):
        tokens = sorted(random.sample(tokens, sample))
    wanted += tokens
    ids = _Ids(data, advance)
    try:
        found = digest_blocks(data.root, wanted, ids.visit)
    except OSError as error:
        raise data.damaged(f"{error.filename} cannot be read: {error.strerror}.") from error
    wrong: dict[str, list[Block]] = {}
    for name, block in wanted:
        if found[name, block.offset] != block.digest:
            wrong.setdefault(name, []).append(block)
    if wrong:
        raise data.damaged(" ".join(_describe(name, blocks) for name, blocks in wrong.items()))
    ids.refuse()
    if sample is None:
        loaded = load_tokenizer(data.tokenizer_dir)
        if (loaded.vocab_size, loaded.eos_id) != (data.vocab_size, data.eos_id):
            raise data.damaged(
                f"data.json says {data.vocab_size} tokens and end token {data.eos_id}; the "
                f"tokenizer has {loaded.vocab_size} and {loaded.eos_id}."
            )
    size = sum(block.length for _, block in wanted)
    return Verified(len(wanted), total, size, time.perf_counter() - began)


def _listed(data: PreparedData) -> dict[str, File]:
    """Return the files of the list, all of which are there with the size that it says."""
    try:
        files = read_blocks(data.root / CHECKSUMS)
    except UserError as error:
        raise data.damaged(str(error)) from error
    streams = {f"{split}{name}" for split in data.splits for name in _vocabularies(data)}
    splits = {f"{stream}.{kind}" for stream in streams for kind in ("bin", "idx")}
    known = splits | {"data.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    there = {path.relative_to(data.root).as_posix() for path in data.tokenizer_dir.rglob("*")}
    for name in sorted(known - files.keys()):
        raise data.damaged(f"{CHECKSUMS} does not list {name}.")
    for name in sorted((files.keys() | there) - known):
        # Libraries read other files of a tokenizer's folder, so those are held to the list too.
        if name not in there or name not in files:
            what = "is missing" if name in files else "was not there when the data were made"
            raise data.damaged(f"{name} {what}.")
    for name, file in files.items():
        path = data.root / name
        if not path.is_file():
            raise data.damaged(f"{name} is not a regular file.")
        if path.stat().st_size != file["size"]:
            raise data.damaged(
                f"{name} has {path.stat().st_size:,} bytes instead of {file['size']:,}."
            )
    return files


def _describe(name: str, blocks: list[Block]) -> str:
    first = blocks[0]
    where = f"bytes {first.offset:,} to {first.offset + first.length - 1:,}"
    others = f" and {len(blocks) - 1:,} other blocks" if len(blocks) > 1 else ""
    return f"{name} has changed in block {first.offset // BLOCK_BYTES:,} ({where}){others}."


def _vocabularies(data: PreparedData) -> dict[str, int]:
    """Return the number of ids of tokens (an empty name) and of each side channel (``.NAME``)."""
    channels = {f".{channel.name}": channel.vocab_size for channel in data.side_channels}
    return {"": data.vocab_size, **channels}


class _Ids:
    """Looks for ids beyond the vocabulary in tokens and side channels that are read."""

    def __init__(self, data: PreparedData, advance: Advance | None):
        self._data, self._advance = data, advance
        self._sizes = {
            f"{split}{name}.bin": size
            for split in data.splits
            for name, size in _vocabularies(data).items()
        }
        self._opened = {
            name: IndexedTokens.open(data.root / name.removesuffix(".bin")) for name in self._sizes
        }
        self._wrong: list[tuple[str, int, int]] = []

    def visit(self, name: str, offset: int, chunk: memoryview) -> None:
        """Look at the bytes of a file from an offset on."""
        if self._advance is not None:
            self._advance(len(chunk))
        if name not in self._opened:
            return
        dtype = np.dtype(self._opened[name].dtype)
        ids = np.frombuffer(chunk, dtype, len(chunk) // dtype.itemsize)
        size = self._sizes[name]
        if len(ids) and (ids.min() < 0 or ids.max() >= size):
            first = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
            self._wrong.append((name, offset + first * dtype.itemsize, int(ids[first])))

    def refuse(self) -> None:
        """Raise a UserError for the first id that was beyond the vocabulary."""
        if not self._wrong:
            return
        name, offset, found = min(self._wrong)
        offsets = self._opened[name].offsets
        document = int(np.searchsorted(offsets, offset, side="right")) - 1
        raise self._data.damaged(
            f"{name} has token id {found} in document {max(document, 0):,}, but the vocabulary has "
            f"{self._sizes[name]} tokens."
        )
