"""Find text on disk and read it one document at a time.

A text file is one document; each line of a JSONL file is one document. `.gz`, `.bz2`, `.xz` and
`.zst` are decompressed on the way. Nothing here imports torch, and no more than one document is
held in memory.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, cast

from nemo_megacpp.errors import UserError, nearest

MAX_DOCUMENT_BYTES = 1 << 30
"""A byte is at most one token, and Megatron's index holds a document's length as an int32."""

USUAL_DOCUMENT_BYTES = 100_000_000
"""What a document may have unless asked otherwise: tokenizing takes 30 times its memory."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

MAX_REPLACED = 0.1
"""Above this share of undecodable characters a file is not text in UTF-8, but something else."""


@dataclass(frozen=True)
class SourceFile:
    """A file to read, or a span of lines of a plain ``.jsonl`` file.

    Attributes:
        key: its path below the root that the user named, with ``/``.
        path, size, mtime_ns: of the file; ``size`` of the span.
        start, first_line: where the span begins, in bytes, and the number of its first line.
        stop: where it ends; None for the end of the file.
    """

    key: str
    path: Path
    size: int
    mtime_ns: int
    start: int = 0
    stop: int | None = None
    first_line: int = 1

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a document."""
        name = self.path.name.lower()
        return name.endswith((".jsonl", *(f".jsonl{suffix}" for suffix in COMPRESSED)))


@dataclass(frozen=True)
class Document:
    """One document. ``key`` names it for the split: the file's key, and the line for JSONL."""

    key: str
    text: str
    size: int
    """Bytes of ``text`` in UTF-8."""


def torch_headers() -> Path:
    """Return the folder of C++ headers in the installed torch, without importing torch.

    Raises:
        UserError: torch is not installed, or its headers are not.
    """
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("torch is not installed, so its C++ headers cannot be the corpus.")
    folder = Path(next(iter(spec.submodule_search_locations))) / "include"
    if not folder.is_dir():
        raise UserError(f"This torch has no C++ headers: {folder} is missing.")
    return folder


def find_files(
    paths: Iterable[str | os.PathLike[str]], exclude: Path | None = None
) -> list[SourceFile]:
    """List the files to read, in a stable order, each once.

    Folders are searched recursively; hidden files and folders in them are left out. A file that is
    named is always taken.

    Args:
        paths: Files and folders.
        exclude: A folder to pass over, such as the output.

    Raises:
        UserError: No path was given, a path is missing, or nothing was found.
    """
    roots = [Path(path) for path in paths]
    if not roots:
        raise UserError("No input: name at least one file or folder.")
    skip = exclude.resolve() if exclude is not None else None
    found: dict[Path, SourceFile] = {}
    for root in roots:
        if not root.exists():
            raise UserError(f"Input {str(root)!r} does not exist.")
        for path in _walk(root, skip) if root.is_dir() else [root]:
            key = path.relative_to(root).as_posix() if path != root else root.name
            try:
                stat = path.stat()
            except OSError as error:
                raise UserError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
            source = SourceFile(key, path, stat.st_size, stat.st_mtime_ns)
            found.setdefault(path.resolve(), source)
    if not found:
        named = ", ".join(repr(str(root)) for root in roots)
        raise UserError(f"No files in {named} (hidden files and folders are left out).")
    return list(found.values())


def _walk(root: Path, skip: Path | None) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"Cannot read {error.filename!r}: {error.strerror}.") from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        here = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and (skip is None or (here / name).resolve() != skip)
        )
        for name in sorted(names):
            path = here / name
            # A dangling link is kept so that reading it says so; pipes and sockets are no input.
            if not name.startswith(".") and (path.is_file() or path.is_symlink()):
                yield path


def iter_documents(
    files: Iterable[SourceFile],
    *,
    text_key: str = "text",
    max_document_bytes: int = USUAL_DOCUMENT_BYTES,
    counts: Counter[str] | None = None,
) -> Iterator[Document]:
    """Read the documents of ``files``, in their order.

    Args:
        files: As found by `find_files`, or spans of them.
        text_key: The field of a JSONL line that holds the text.
        max_document_bytes: Leave out what is larger (of a JSONL line: with its JSON).
        counts: Where to count what was left out (``empty``, ``binary``, ``huge``) and what was kept
            with replacement characters (``bad_utf8``).

    Raises:
        UserError: A file is unreadable, a compressed stream is broken, or a JSONL line is not an
            object with a string in ``text_key``.
    """
    tally: Counter[str] = Counter() if counts is None else counts
    for source in files:
        try:
            with _open(source.path) as stream:
                if source.is_jsonl:
                    yield from _json_lines(stream, source, text_key, max_document_bytes, tally)
                else:
                    yield from _whole_file(stream, source, max_document_bytes, tally)
        # A cut or broken stream: gzip's EOFError and zlib.error, lzma.LZMAError, bz2's EOFError.
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"Cannot read {str(source.path)!r}: {reason}.") from error


def _open(path: Path) -> BinaryIO:
    name = path.name.lower()
    if name.endswith(".zst"):
        try:
            import pyarrow
        except ImportError:
            raise UserError(
                f"Reading {str(path)!r} needs pyarrow, which is not installed; decompress it, or "
                f"install pyarrow."
            ) from None
        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(path, compression="zstd")))
    readers: dict[str, Callable[..., Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
    }
    return cast(BinaryIO, readers.get(path.suffix.lower(), open)(path, "rb"))


def _whole_file(
    stream: BinaryIO, source: SourceFile, max_bytes: int, tally: Counter[str]
) -> Iterator[Document]:
    raw = stream.read(max_bytes + 1)
    if len(raw) > max_bytes:
        tally["huge"] += 1
        return
    text = None if b"\0" in raw else _decode(raw, tally)
    if text is None:
        tally["binary"] += 1
    elif not text.strip():
        tally["empty"] += 1
    else:
        yield Document(source.key, text, len(text.encode()))


def _json_lines(
    stream: BinaryIO, source: SourceFile, text_key: str, max_bytes: int, tally: Counter[str]
) -> Iterator[Document]:
    number, position = source.first_line - 1, source.start
    if position:
        stream.seek(position)
    while source.stop is None or position < source.stop:
        raw = stream.readline(max_bytes + 1)
        if not raw:
            break
        number, position = number + 1, position + len(raw)
        if len(raw) > max_bytes:
            tally["huge"] += 1
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(max_bytes)
                position += len(raw)
            continue
        where = f"{source.path}:{number}"
        if not raw.strip():
            continue
        line = _decode(raw, tally)
        if line is None:
            tally["binary"] += 1
            continue
        text = _text_field(line, text_key, where)
        try:
            size = len(text.encode())
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; UTF-8 cannot.
            tally["bad_utf8"] += 1
            text = text.encode(errors="replace").decode()
            size = len(text.encode())
        if text.strip():
            yield Document(f"{source.key}:{number}", text, size)
        else:
            tally["empty"] += 1


def _text_field(line: str, text_key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is a JSON {type(record).__name__}, not an object with a text.")
    if text_key not in record:
        keys = ", ".join(sorted(record)) or "none"
        hint = nearest(text_key, record)
        raise UserError(f"{where} has no field {text_key!r}; its fields: {keys}.{hint}")
    text = record[text_key]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(f"{where}: field {text_key!r} is a {kind}, not a string.")
    return text


def _decode(raw: bytes, tally: Counter[str]) -> str | None:
    """Return the text without a byte-order mark, or None where ``raw`` is not UTF-8 text."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("utf-8-sig", errors="replace")
    if text.count("\ufffd") > MAX_REPLACED * len(text):
        return None
    tally["bad_utf8"] += 1
    return text
