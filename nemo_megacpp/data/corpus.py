"""Find text on disk: the files, what a document of them is, and what reading them left out.

A text file is one document; each line of a JSONL file is one document. `.gz`, `.bz2`, `.xz` and
`.zst` are decompressed while they are read. Nothing here imports torch.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_megacpp.data.text_encoding import suggest_encoding
from nemo_megacpp.errors import UserError

if TYPE_CHECKING:
    from nemo_megacpp.data.side_channels import Values
    from nemo_megacpp.side_channels import SideChannel

MAX_DOCUMENT_BYTES = 1 << 30
"""A byte is at most one token, and Megatron's index holds a document's length as an int32."""

USUAL_DOCUMENT_BYTES = 100_000_000
"""Default size limit of a document: tokenizing takes 30 times its memory."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

NAMED = 10
"""Files and lines of each kind that a `Tally` names."""

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
            named.append(name + (suggest_encoding(raw) if raw else ""))

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
