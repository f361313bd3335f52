"""The manifest of a checkpoint: a checksum of every file, written last, checked before a load.

Checksums are taken over blocks. In a ``.distcp`` file a block lies within one shard of one tensor,
so that a damaged byte can be attributed to its tensor without reading the checkpoint's own
metadata, which may be what is damaged. Threads check the blocks, a few MiB at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import TypedDict

from nemo_megacpp.checkpoint.identity import read_identity
from nemo_megacpp.checkpoint.safe_pickle import METADATA, read_metadata
from nemo_megacpp.errors import UserError
from nemo_megacpp.json_files import Count, Text, parse_json, read_limited

FILE = "nemo_megacpp.manifest.json"
SCHEMA = 1

_PARTIAL = f"{FILE}.partial"
_HASH = "sha256"  # releases the GIL; processors have instructions for it
_LIMIT = 1 << 30
"""Most bytes of a manifest."""
BLOCK_BYTES = 16 << 20
"""Most bytes under one checksum."""
_BATCH = 64 << 20
"""Bytes of small blocks that one thread takes at a time."""
_READ = 4 << 20
"""Bytes in memory per thread."""
_THREADS = min(16, 2 * (os.cpu_count() or 1))
_MOST_NAMED = 8

Visit = Callable[[str, int, memoryview], None]


class Block(NamedTuple):
    """A span of a file under one checksum, and the tensor it belongs to, if any."""

    offset: Count
    length: Count
    digest: Text
    tensor: Text


class File(TypedDict):
    """Size of a file, and the blocks that cover it."""

    size: Count
    blocks: list[Block]


class _Manifest(TypedDict):
    schema: int
    hash: str
    files: dict[Text, File]
    own_checksum: str


# --- writing


def write_manifest(directory: Path) -> None:
    """Write the manifest of a checkpoint whose other files are complete, atomically.

    It is the last file of a checkpoint. The files that it lists are flushed to the disk first, so
    that a manifest that survives a crash lists only data that survived it.

    Args:
        directory: a checkpoint: a folder with ``weights/`` in it, or the weights' own.

    Raises:
        UserError: the checkpoint's ``.metadata`` cannot be read.
        OSError: from the file system.
    """
    paths = list(_files(directory))
    shards = _shards(directory)
    sizes = {path: (directory / path).stat().st_size for path in paths}
    blocks = [(path, block) for path in paths for block in _cut(shards.get(path, []), sizes[path])]
    files: dict[str, File] = {path: {"size": sizes[path], "blocks": []} for path in paths}
    digests = digest_blocks(directory, blocks)
    for path, block in blocks:
        digest = digests[path, block.offset]
        files[path]["blocks"].append(block._replace(digest=digest))
    for path in paths:
        sync(directory / path)
    for folder in {(directory / path).parent for path in paths}:
        sync(folder)
    write_blocks(directory / FILE, files)


def write_blocks(path: Path, files: dict[str, File]) -> None:
    """Write a list of files and their blocks by one rename, flushed to the disk.

    Raises:
        OSError: from the file system.
    """
    content = {"schema": SCHEMA, "hash": _HASH, "files": files}
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump({**content, "own_checksum": _own_checksum(content)}, stream, indent=0)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)
    sync(path.parent)


def _shards(directory: Path) -> dict[str, list[tuple[int, int, str]]]:
    """Return offset, length and tensor of every shard, by file, for each DCP folder inside."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for weights in (path.parent for path in directory.rglob(METADATA)):
        for index, place in read_metadata(weights).storage_data.items():
            file = (weights / place.relative_path).relative_to(directory).as_posix()
            found.setdefault(file, []).append((place.offset, place.length, index.fqn))
    return found


def _cut(shards: list[tuple[int, int, str]], size: int) -> list[Block]:
    """Cut a file of ``size`` bytes at its shards, and those into blocks."""
    names = {offset: tensor for offset, _, tensor in shards}
    ends = {offset + length for offset, length, _ in shards}
    edges = sorted(edge for edge in {0, size} | names.keys() | ends if edge <= size)
    return [
        Block(offset, min(BLOCK_BYTES, stop - offset), "", names.get(start, ""))
        for start, stop in pairwise(edges)
        for offset in range(start, stop, BLOCK_BYTES)
    ]


# --- checking


def is_complete(directory: Path) -> bool:
    """Whether a checkpoint was saved to the end: the manifest is intact, and every file has the
    size that it lists. Contents are not read."""
    try:
        check_manifest(directory, full=False)
    except UserError:
        return False
    return (directory / FILE).exists()


def check_manifest(directory: Path, *, full: bool = True) -> str:
    """Compare a checkpoint with its manifest.

    Args:
        directory: the checkpoint.
        full: also read every byte; otherwise names and sizes only.

    Returns:
        One phrase that says what was verified, or that a checkpoint from elsewhere has no manifest.

    Raises:
        UserError: naming each file that was changed, truncated, is missing or foreign, and the
            tensors whose bytes are affected; or the identity says that there was a manifest.
    """
    path = directory / FILE
    if not path.exists():
        if "manifest" in (read_identity(directory) or {}):
            raise UserError(
                f"The checkpoint {directory} has no manifest, and was saved with one: {FILE} was "
                f"removed, or the save did not end. verify_checkpoint=false (of 'checkpoint': "
                f"--no-verify) loads it unverified."
            )
        return "no manifest: nothing to verify it against"
    files = read_blocks(path)
    try:
        damage = list(_wrong_sizes(directory, files))
        if full and not damage:
            damage = list(_wrong_contents(directory, files))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from None
    if damage:
        left = len(damage) - _MOST_NAMED
        more = f"; and {left} more" if left > 0 else ""
        raise UserError(
            f"The checkpoint {directory} is damaged: {'; '.join(damage[:_MOST_NAMED])}{more}."
        )
    size = sum(file["size"] for file in files.values())
    checked = "contents verified" if full else "sizes match, contents not read"
    return f"{len(files)} files, {size:,} bytes, {checked}"


def read_blocks(path: Path) -> dict[str, File]:
    """Return what `write_blocks` has written.

    Raises:
        UserError: the list is missing, damaged, or of another version.
    """
    from pydantic import TypeAdapter

    content = read_limited(path, _LIMIT)
    held = parse_json(content, TypeAdapter(dict[str, Any]), path)
    if held.pop("own_checksum", None) != _own_checksum(held):
        raise UserError(f"The manifest {path} is damaged: its own checksum does not match.")
    if (held.get("schema"), held.get("hash")) != (SCHEMA, _HASH):
        raise UserError(
            f"{path} has schema {held.get('schema')} ({held.get('hash')}); this version reads "
            f"schema {SCHEMA} ({_HASH})."
        )
    files = parse_json(content, TypeAdapter(_Manifest), path)["files"]
    for name, file in files.items():
        ends = [0, *(block.offset + block.length for block in file["blocks"])]
        starts = [*(block.offset for block in file["blocks"]), file["size"]]
        if starts != ends:
            raise UserError(f"The manifest {path} is damaged: its blocks do not cover {name}.")
    return files


def _wrong_sizes(directory: Path, files: dict[str, File]) -> Iterator[str]:
    there = set(_files(directory))
    for path, file in sorted(files.items()):
        if path not in there:
            yield f"{path} is missing{_of(file['blocks'])}"
            continue
        size = (directory / path).stat().st_size
        if size != file["size"]:
            lost = [block for block in file["blocks"] if block.offset + block.length > size]
            yield f"{path} has {size:,} bytes instead of {file['size']:,}{_of(lost)}"
    for path in sorted(there - files.keys()):
        yield f"{path} is foreign: it was not there when the checkpoint was saved"


def _wrong_contents(directory: Path, files: dict[str, File]) -> Iterator[str]:
    wanted = [(path, block) for path, file in files.items() for block in file["blocks"]]
    found = digest_blocks(directory, wanted)
    wrong: dict[str, list[Block]] = {}
    for path, block in wanted:
        if found[path, block.offset] != block.digest:
            wrong.setdefault(path, []).append(block)
    for path, blocks in sorted(wrong.items()):
        first = blocks[0]
        where = f"bytes {first.offset:,} to {first.offset + first.length - 1:,}"
        others = f" and {len(blocks) - 1} other blocks" if len(blocks) > 1 else ""
        yield f"{path} has changed in {where}{others}{_of(blocks)}"


def _of(blocks: Sequence[Block]) -> str:
    tensors = list(dict.fromkeys(block.tensor for block in blocks if block.tensor))
    if not tensors:
        return ""
    more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    return f" (of {', '.join(tensors[:3])}{more})"


# --- reading


def _files(directory: Path) -> Iterator[str]:
    """Yield every file under ``directory`` but the manifest itself, as a relative POSIX path.

    A symbolic link to a folder is yielded as a file, and not followed out of the checkpoint.
    """
    for folder, folders, names in os.walk(directory):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in (*names, *links):
            path = (Path(folder) / name).relative_to(directory).as_posix()
            if path not in (FILE, _PARTIAL):
                yield path


def digest_blocks(
    directory: Path, blocks: Sequence[tuple[str, Block]], visit: Visit | None = None
) -> dict[tuple[str, int], str]:
    """Return the digest of every block, by file and offset; "" where it cannot be read.

    Args:
        directory: of the files.
        blocks: files, relative to it, and their blocks.
        visit: called by several threads with the file, an offset, and the bytes there: some MiB,
            a multiple of 8 unless a block ends.
    """
    batches: list[list[tuple[str, Block]]] = []
    taken = _BATCH
    for path, block in blocks:
        if taken >= _BATCH or batches[-1][-1][0] != path:
            batches.append([])
            taken = 0
        batches[-1].append((path, block))
        taken += block.length
    found: dict[tuple[str, int], str] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for digests in pool.map(lambda batch: _digest_batch(directory, batch, visit), batches):
            found.update(digests)
    return found


def _digest_batch(
    directory: Path, batch: Sequence[tuple[str, Block]], visit: Visit | None
) -> dict[tuple[str, int], str]:
    """Digest blocks of one file."""
    path = batch[0][0]
    buffer = memoryview(bytearray(min(_READ, max(block.length for _, block in batch))))
    digests = {}
    with (directory / path).open("rb") as stream:
        for _, block in batch:
            stream.seek(block.offset)
            digest, left = hashlib.new(_HASH), block.length
            while left and (count := stream.readinto(buffer[:left])):
                digest.update(buffer[:count])
                if visit is not None:
                    visit(path, block.offset + block.length - left, buffer[:count])
                left -= count
            digests[path, block.offset] = "" if left else digest.hexdigest()
    return digests


def _own_checksum(content: dict[str, Any]) -> str:
    return hashlib.new(_HASH, json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
