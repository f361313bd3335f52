"""The manifest of a checkpoint: a checksum of every file, written last, checked before a load.

Checksums are taken over blocks. In a ``.distcp`` file a block lies within one shard of one tensor,
so that a damaged byte can be named by its tensor, without reading the checkpoint's own metadata,
which may be what is damaged. Blocks are checked independently, by threads, a few MiB at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_megacpp.checkpoint.safe_pickle import METADATA, read_metadata
from nemo_megacpp.errors import UserError

FILE = "nemo_megacpp.manifest.json"
SCHEMA = 1

_PARTIAL = f"{FILE}.partial"
_HASH = "sha256"  # releases the GIL; processors have instructions for it
_BLOCK = 16 << 20
"""Most bytes under one checksum."""
_BATCH = 64 << 20
"""Bytes of small blocks that one thread takes at a time."""
_READ = 4 << 20
"""Bytes in memory per thread."""
_THREADS = min(16, 2 * (os.cpu_count() or 1))
_MOST_NAMED = 8


@dataclass(frozen=True)
class ManifestState:
    """What a check found to be in order.

    Attributes:
        present: whether there is a manifest. Without one nothing was checked.
        files: number of files that it lists.
        bytes: their size.
        full: whether their contents were read, or only their sizes compared.
    """

    present: bool
    files: int = 0
    bytes: int = 0
    full: bool = False

    def __str__(self) -> str:
        if not self.present:
            return "no manifest: nothing to verify it against"
        checked = "contents verified" if self.full else "sizes match, contents not read"
        return f"{self.files} files, {self.bytes:,} bytes, {checked}"


@dataclass(frozen=True)
class _Block:
    offset: int
    length: int
    digest: str
    tensor: str


# --- writing


def write_manifest(directory: Path) -> None:
    """Write the manifest of a checkpoint whose other files are all there, atomically.

    It is the last file of a checkpoint: nothing is added to one later. What it lists is flushed to
    the disk first, so that a manifest that survives a crash speaks of data that did.

    Args:
        directory: a checkpoint: a folder with ``weights/`` in it, or the weights' own.

    Raises:
        UserError: the checkpoint's ``.metadata`` cannot be read.
        OSError: from the file system.
    """
    paths = list(_files(directory))
    plan = _shards(directory)
    blocks = {path: _cut(plan.get(path, []), (directory / path).stat().st_size) for path in paths}
    digests = _digests(directory, [(path, block) for path in paths for block in blocks[path]])
    files = {
        path: {
            "size": (directory / path).stat().st_size,
            "blocks": [[b.offset, b.length, digests[path, b.offset], b.tensor] for b in cut],
        }
        for path, cut in blocks.items()
    }
    content = {"schema": SCHEMA, "hash": _HASH, "files": files}
    text = json.dumps({**content, "own_checksum": _own_checksum(content)}, indent=0)
    for path in paths:
        sync(directory / path)
    for folder in {(directory / path).parent for path in paths}:
        sync(folder)
    partial = directory / _PARTIAL
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(directory / FILE)
    sync(directory)


def _shards(directory: Path) -> dict[str, list[tuple[int, int, str]]]:
    """Return offset, length and tensor of every shard, by file, for each DCP folder inside."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for weights in (path.parent for path in directory.rglob(METADATA)):
        for index, place in read_metadata(weights).storage_data.items():
            file = (weights / place.relative_path).relative_to(directory).as_posix()
            found.setdefault(file, []).append((place.offset, place.length, index.fqn))
    return found


def _cut(shards: list[tuple[int, int, str]], size: int) -> list[_Block]:
    """Cut a file of ``size`` bytes at its shards, and those into blocks."""
    names = {offset: tensor for offset, _, tensor in shards}
    ends = {offset + length for offset, length, _ in shards}
    edges = sorted(edge for edge in {0, size} | names.keys() | ends if edge <= size)
    return [
        _Block(offset, min(_BLOCK, stop - offset), "", names.get(start, ""))
        for start, stop in pairwise(edges)
        for offset in range(start, stop, _BLOCK)
    ]


# --- checking


def is_complete(directory: Path) -> bool:
    """Say whether a checkpoint was saved to the end and nothing of it has gone since.

    The manifest is there, is itself intact, and every file has its size; contents are not read.
    """
    try:
        return check_manifest(directory, full=False).present
    except UserError:
        return False


def check_manifest(directory: Path, *, full: bool = True) -> ManifestState:
    """Compare a checkpoint with its manifest.

    Args:
        directory: the checkpoint.
        full: also read every byte; otherwise names and sizes only.

    Returns:
        What was checked; ``present`` is False for a checkpoint without a manifest.

    Raises:
        UserError: naming each file that was changed, truncated, is missing or foreign, and the
            tensors whose bytes are affected.
    """
    files = _listed(directory / FILE)
    if files is None:
        return ManifestState(present=False)
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
    return ManifestState(True, len(files), sum(file["size"] for file in files.values()), full)


def _listed(path: Path) -> dict[str, Any] | None:
    """Return what a manifest says of each file; None if there is no manifest."""
    try:
        content = json.loads(path.read_bytes())
        own_checksum = content.pop("own_checksum")
        if own_checksum != _own_checksum(content):
            raise ValueError("its own checksum does not match")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"The manifest {path} is damaged: {error}.") from None
    if (content["schema"], content["hash"]) != (SCHEMA, _HASH):
        raise UserError(
            f"{path} is of schema {content['schema']} ({content['hash']}); this version reads "
            f"schema {SCHEMA} ({_HASH})."
        )
    return content["files"]


def _wrong_sizes(directory: Path, files: dict[str, Any]) -> Iterator[str]:
    there = set(_files(directory))
    for path, file in sorted(files.items()):
        if path not in there:
            yield f"{path} is missing{_of(file['blocks'])}"
            continue
        size = (directory / path).stat().st_size
        if size != file["size"]:
            lost = [block for block in file["blocks"] if block[0] + block[1] > size]
            yield f"{path} has {size:,} bytes instead of {file['size']:,}{_of(lost)}"
    for path in sorted(there - files.keys()):
        yield f"{path} is foreign: it was not there when the checkpoint was saved"


def _wrong_contents(directory: Path, files: dict[str, Any]) -> Iterator[str]:
    wanted = [(path, _Block(*block)) for path, file in files.items() for block in file["blocks"]]
    found = _digests(directory, wanted)
    wrong: dict[str, list[_Block]] = {}
    for path, block in wanted:
        if found[path, block.offset] != block.digest:
            wrong.setdefault(path, []).append(block)
    for path, blocks in sorted(wrong.items()):
        first = blocks[0]
        where = f"bytes {first.offset:,} to {first.offset + first.length - 1:,}"
        others = f" and {len(blocks) - 1} other blocks" if len(blocks) > 1 else ""
        tensors = _of([[b.offset, b.length, b.digest, b.tensor] for b in blocks])
        yield f"{path} has changed in {where}{others}{tensors}"


def _of(blocks: Sequence[Sequence[Any]]) -> str:
    tensors = list(dict.fromkeys(tensor for *_, tensor in blocks if tensor))
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


def _digests(directory: Path, blocks: Sequence[tuple[str, _Block]]) -> dict[tuple[str, int], str]:
    """Return the digest of every block, by file and offset; "" where it cannot be read."""
    batches: list[list[tuple[str, _Block]]] = []
    taken = _BATCH
    for path, block in blocks:
        if taken >= _BATCH or batches[-1][-1][0] != path:
            batches.append([])
            taken = 0
        batches[-1].append((path, block))
        taken += block.length
    found: dict[tuple[str, int], str] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for digests in pool.map(lambda batch: _digest_batch(directory, batch), batches):
            found.update(digests)
    return found


def _digest_batch(
    directory: Path, batch: Sequence[tuple[str, _Block]]
) -> dict[tuple[str, int], str]:
    """Digest adjacent blocks of one file."""
    path = batch[0][0]
    buffer = memoryview(bytearray(min(_READ, max(block.length for _, block in batch))))
    digests = {}
    with (directory / path).open("rb", buffering=0) as stream:
        for _, block in batch:
            stream.seek(block.offset)
            digest, left = hashlib.new(_HASH), block.length
            while left and (count := stream.readinto(buffer[:left])):
                digest.update(buffer[:count])
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
