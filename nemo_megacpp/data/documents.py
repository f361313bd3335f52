"""Read the documents of a corpus, one at a time: no more than one is held in memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from nemo_megacpp.data.corpus import Document, Reading, SourceFile, Tally
from nemo_megacpp.data.jsonl import json_lines
from nemo_megacpp.data.text_encoding import decode
from nemo_megacpp.errors import UserError


def iter_documents(
    files: Iterable[SourceFile], reading: Reading, tally: Tally | None = None
) -> Iterator[Document]:
    """Read the documents of ``files``, in their order.

    A malformed line is skipped; of a broken compressed stream, the lines before the break are read.

    Args:
        files: as found by `nemo_megacpp.data.corpus.find_files`, or spans of them.
        reading: how to read them.
        tally: counts and names what is left out or repaired.
    """
    tally = Tally() if tally is None else tally
    for source in files:
        reasons: list[str] = []  # the first malformed line, and why the file cannot be read
        lines = tally.counts["bad_line"]
        try:
            with _open(source.path) as stream:
                if reading.fields and not source.is_jsonl:
                    reasons.append(
                        f"{source.path} is not JSONL and has no field {reading.fields[0]!r} for a "
                        f"side channel."
                    )
                elif source.is_jsonl:
                    yield from json_lines(stream, source, reading, tally, reasons)
                else:
                    yield from _whole_file(stream, source, reading, tally)
        # A cut or broken stream: gzip's EOFError and zlib.error, lzma.LZMAError, bz2's EOFError.
        except (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            reasons.append(f"Cannot read {str(source.path)!r}: {reason.rstrip('.')}.")
        if (more := tally.counts["bad_line"] - lines - 1) > 0:
            reasons[0] += f" ({more:,} more malformed lines in this file)"
        if reasons:
            tally.note("bad_file", " ".join(reasons))


def _open(path: Path) -> io.BufferedReader:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        try:
            import pyarrow
        except ImportError:
            raise UserError(
                f"Reading {str(path)!r} needs pyarrow, which is not installed; decompress it, or "
                f"install pyarrow."
            ) from None
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    readers: dict[str, Callable[..., Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
    }
    return cast(io.BufferedReader, readers.get(suffix, open)(path, "rb"))


def _whole_file(
    stream: io.BufferedReader, source: SourceFile, reading: Reading, tally: Tally
) -> Iterator[Document]:
    raw = stream.read(reading.max_document_bytes + 1)
    text, kind = None, "huge"
    if len(raw) <= reading.max_document_bytes:
        text, kind = decode(raw, reading.encoding)
    if text is not None and not text.strip():
        text, kind = None, "empty"
    if kind:
        tally.note(kind, str(source.path), raw if kind.endswith("utf8") else b"")
    if text is not None:
        yield Document(source.key, text, len(text.encode()))
