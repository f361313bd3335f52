"""Find text on disk and read it one document at a time.

A text file is one document; each line of a JSONL file is one document. `.gz`, `.bz2`, `.xz` and
`.zst` are decompressed while they are read. Nothing here imports torch, and no more than one
document is held in memory.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nemo_megacpp.errors import UserError, nearest

if TYPE_CHECKING:
    from nemo_megacpp.data.side_channels import Values
    from nemo_megacpp.side_channels import SideChannel

MAX_DOCUMENT_BYTES = 1 << 30
"""A byte is at most one token, and Megatron's index holds a document's length as an int32."""

USUAL_DOCUMENT_BYTES = 100_000_000
"""Default size limit of a document: tokenizing takes 30 times its memory."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

MAX_REPLACED = 0.1
"""A text with a larger share of undecodable characters is left out as not UTF-8."""

NAMED = 10
"""Files and lines of each kind that a `Tally` names."""

_KEYS, _KEY = 16, 40
"""Fields of a line that an error names, and the characters of each."""

KINDS = {
    "empty": "Left out: {} empty",
    "binary": "Left out: {} binary",
    "not_utf8": "Left out: {} not UTF-8; decode with --encoding NAME",
    "huge": "Left out: {} larger than --max-document-bytes",
    "bad_utf8": "Repaired: {} not UTF-8, with bytes replaced; decode with --encoding NAME",
    "bad_line": "Skipped: {} malformed lines",
    "bad_file": "Skipped: {} bad files, or the bad part of them",
}
"""What a `Tally` counts."""

_BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class SourceFile:
    """A file to read, or a span of lines of a plain ``.jsonl`` file.

    Attributes:
        key: path relative to the root that the user named, with ``/``.
        path, size, mtime_ns: of the file; ``size`` of the span, in bytes.
        start, first_line: first byte of the span, and the number of its first line.
        stop: byte after the span; None for the end of the file.
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
    """One document; ``key`` is the file's, with the line number for JSONL, ``size`` in UTF-8,
    ``values`` of its side channels."""

    key: str
    text: str
    size: int
    values: Mapping[str, Values] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """How documents are read.

    Attributes:
        text_key: field of a JSONL line that holds the text.
        max_document_bytes: larger documents are left out (of a JSONL line: with its JSON).
        encoding: of text that is not UTF-8 and has no byte-order mark; None leaves it out.
        side_channels: whose ids are made.
    """

    text_key: str = "text"
    max_document_bytes: int = USUAL_DOCUMENT_BYTES
    encoding: str | None = None
    side_channels: tuple[SideChannel, ...] = ()

    @property
    def fields(self) -> list[str]:
        """The JSONL fields that side channels need."""
        return [channel.field for channel in self.side_channels if channel.field is not None]


@dataclass
class Tally:
    """What reading left out or repaired.

    Attributes:
        counts: files and lines of each of `KINDS`.
        names: the first `NAMED` of each kind; of ``bad_file`` the reason as well.
    """

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def note(self, kind: str, name: str, raw: bytes = b"") -> None:
        """Count a file or line; ``raw`` is text for which an encoding can be suggested."""
        self.counts[kind] += 1
        named = self.names.setdefault(kind, [])
        if len(named) < NAMED:
            named.append(name + (_suggest_encoding(raw) if raw else ""))

    def add(self, other: Tally) -> None:
        """Add what another part of the corpus gave."""
        self.counts += other.counts
        for kind, names in other.names.items():
            self.names[kind] = [*self.names.get(kind, []), *names][:NAMED]

    def describe(self) -> list[str]:
        """Return a line for each kind, and below it the first names."""
        lines = []
        for kind, words in KINDS.items():
            if count := self.counts[kind]:
                names = self.names.get(kind, [])[:3]
                lines.append(words.format(f"{count:,}") + (":" if names else "."))
                lines += [f"  {name}" for name in names]
                if names and count > len(names):
                    lines.append(f"  and {count - len(names):,} more")
        return lines


def find_files(
    paths: Iterable[str | os.PathLike[str]], tally: Tally, exclude: Path | None = None
) -> list[SourceFile]:
    """List the files to read, in a stable order, each once.

    Folders are searched recursively; hidden files and folders in them are ignored. A file that is
    named is always read. Pipes, sockets and devices are not opened: a pipe would be waited for.

    Args:
        paths: files and folders.
        tally: counts what cannot be read, as ``bad_file``; pipes, sockets and devices too.
        exclude: folder to ignore, such as the output.

    Raises:
        UserError: no path was given, paths do not exist or are neither files nor folders, or
            nothing was found.
    """
    roots = [Path(path) for path in paths]
    if not roots:
        raise UserError("No input: name at least one file or folder.")
    missing = [repr(str(root)) for root in roots if not root.exists()]
    if missing:
        verb = "does" if len(missing) == 1 else "do"
        raise UserError(f"Input {', '.join(missing)} {verb} not exist.")
    skip = exclude.resolve() if exclude is not None else None
    found: dict[Path, SourceFile] = {}

    def note(error: OSError) -> None:
        tally.note("bad_file", f"Cannot read {error.filename!r}: {error.strerror}.")

    for root in roots:
        for path in _walk(root, skip, note) if root.is_dir() else [root]:
            key = path.relative_to(root).as_posix() if path != root else root.name
            try:
                status = path.stat()
            except OSError as error:
                note(error)
                continue
            if stat.S_ISREG(status.st_mode):
                source = SourceFile(key, path, status.st_size, status.st_mtime_ns)
                found.setdefault(path.resolve(), source)
                continue
            reason = f"{str(path)!r} is {_kind(status.st_mode)}, not a file."
            if path == root:
                raise UserError(f"Input {reason}")
            tally.note("bad_file", reason)
    if not found and not tally.counts:
        named = ", ".join(repr(str(root)) for root in roots)
        raise UserError(f"No files in {named} (hidden files and folders are ignored).")
    return list(found.values())


def _walk(root: Path, skip: Path | None, note: Callable[[OSError], None]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root, onerror=note):
        here = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and (skip is None or (here / name).resolve() != skip)
        )
        for name in sorted(names):
            if not name.startswith("."):
                yield here / name


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((words for test, words in kinds.items() if test(mode)), "a link to a folder")


def check_encoding(name: str) -> str:
    """Return Python's name of an encoding.

    Raises:
        UserError: Python does not know it, or it writes all text in ASCII bytes, so that it cannot
            be told from UTF-8.
    """
    try:
        sample = "é日ф".encode(name, errors="ignore")
    except (LookupError, UnicodeError):
        known = ("latin-1", "cp1250", "cp1251", "cp1252", "shift_jis", "gb18030", "utf-16-le")
        raise UserError(
            f"--encoding {name} is not a text encoding that Python knows.{nearest(name, known)} "
            f"Examples: {', '.join(known)}."
        ) from None
    if sample and sample.isascii():
        raise UserError(
            f"--encoding {name} writes text in ASCII bytes, which are valid UTF-8 as well. Convert "
            f"the files to UTF-8 first, for example with iconv."
        )
    return codecs.lookup(name).name


def iter_documents(
    files: Iterable[SourceFile], reading: Reading, tally: Tally | None = None
) -> Iterator[Document]:
    """Read the documents of ``files``, in their order.

    A malformed line is skipped; of a broken compressed stream, the lines before the break are read.

    Args:
        files: as found by `find_files`, or spans of them.
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
                    yield from _json_lines(stream, source, reading, tally, reasons)
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
        text, kind = _decode(raw, reading.encoding)
    if text is not None and not text.strip():
        text, kind = None, "empty"
    if kind:
        tally.note(kind, str(source.path), raw if kind.endswith("utf8") else b"")
    if text is not None:
        yield Document(source.key, text, len(text.encode()))


def _json_lines(
    stream: io.BufferedReader,
    source: SourceFile,
    reading: Reading,
    tally: Tally,
    reasons: list[str],
) -> Iterator[Document]:
    from nemo_megacpp.data.side_channels import read_values  # it loads numpy

    for number, raw in _lines(stream, source, reading):
        where = f"{source.path}:{number}"
        if len(raw) > reading.max_document_bytes:
            tally.note("huge", where)
            continue
        if not raw.strip():
            continue
        line, kind = _decode(raw, reading.encoding)
        if line is None and kind == "not_utf8":
            tally.note(kind, where, raw)
            continue
        try:
            record, text = _text_field(line, reading.text_key)
            values = read_values(record, text, reading.side_channels)
        except ValueError as error:
            tally.counts["bad_line"] += 1
            if not reasons:
                reasons.append(f"{where} {error}")
            continue
        try:
            size = len(text.encode())
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; UTF-8 cannot.
            kind, text = "bad_utf8", text.encode(errors="replace").decode()
            size = len(text.encode())
        if not text.strip():
            kind = "empty"
        if kind:
            tally.note(kind, where)
        if kind != "empty":
            yield Document(f"{source.key}:{number}", text, size, values)


def _lines(
    stream: io.BufferedReader, source: SourceFile, reading: Reading
) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a span with their numbers; of a line that is too large, its beginning."""
    limit = reading.max_document_bytes + 1
    if source.start:
        stream.seek(source.start)
    wide = wide_encoding(stream.peek(4)[:4], reading.encoding)
    if wide is not None:  # its newlines are several bytes, one of which other characters have too
        with io.TextIOWrapper(stream, wide, newline="\n") as text:
            number = 0
            while line := text.readline(limit):
                number += 1
                yield number, line.encode()
                while len(line) == limit and not line.endswith("\n"):
                    line = text.readline(limit)
        return
    number, position = source.first_line - 1, source.start
    while source.stop is None or position < source.stop:
        raw = stream.readline(limit)
        if not raw:
            break
        number, position = number + 1, position + len(raw)
        yield number, raw
        while len(raw) == limit and not raw.endswith(b"\n"):
            raw = stream.readline(limit)
            position += len(raw)


def wide_encoding(head: bytes, encoding: str | None) -> str | None:
    """Return the encoding of a file in UTF-16 or UTF-32, from its first 4 bytes; else None."""
    for mark, name in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return name
    return (
        encoding if encoding and encoding.startswith(("utf-16", "utf-32")) and 0 in head else None
    )


def _text_field(line: str | None, text_key: str) -> tuple[dict[str, Any], str]:
    """Return the object of a JSONL line, and its text.

    Raises:
        ValueError: what is wrong with the line.
    """
    if line is None:
        raise ValueError("is not JSON: it has NUL bytes.")
    try:
        record = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} in column {error.colno}.") from error
    except RecursionError as error:
        raise ValueError("is not JSON: it is nested too deeply.") from error
    except ValueError as error:
        raise ValueError("has a number of too many digits.") from error
    if not isinstance(record, dict):
        raise ValueError(f"is a JSON {type(record).__name__}, not an object with a text.")
    if text_key not in record:
        known = [key[:_KEY] for key in sorted(record)[:_KEYS]]
        keys = ", ".join([*known, *(["…"] if len(record) > _KEYS else [])]) or "none"
        hint = nearest(text_key, known)
        raise ValueError(f"has no field {text_key!r}; its fields: {keys}.{hint}")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"has a {type(text).__name__} in field {text_key!r}, not a string.")
    return record, text


def _decode(raw: bytes, encoding: str | None) -> tuple[str | None, str]:
    """Decode text, without its byte-order mark.

    Returns:
        The text, or None where ``raw`` is not text; the kind to count it as, or an empty string.
    """
    wide = wide_encoding(raw[:4], encoding)
    if wide is not None:
        candidates = [wide]
    elif b"\0" in raw:
        return None, "binary"
    else:
        candidates = ["utf-8-sig", *([encoding] if encoding else [])]
    for name in candidates:
        with suppress(UnicodeDecodeError):
            text = raw.decode(name)
            return (None, "binary") if "\0" in text else (text, "")
    if wide is not None:
        return None, "binary"
    text = raw.decode("utf-8-sig", errors="replace")
    if text.count("\ufffd") > MAX_REPLACED * len(text):
        return None, "not_utf8"
    return text, "bad_utf8"


def _suggest_encoding(raw: bytes) -> str:
    """Return `` (perhaps NAME)`` for text that is not UTF-8, or an empty string.

    Only a suggestion: of 16 short texts in 13 encodings, the library named two wrongly.
    """
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return ""
    match = from_bytes(raw[: 1 << 14]).best()
    if match is None:
        return ""
    names = [match.encoding, *match.could_be_from_charset]
    usual = (name for name in ("cp1252", "latin_1") if name in names)
    return f" (perhaps {next(usual, match.encoding)})"
