"""Read the lines of a JSONL file, each a document."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from nemo_megacpp.data.corpus import Document, Reading, SourceFile, Tally
from nemo_megacpp.data.text_encoding import decode, wide_encoding
from nemo_megacpp.errors import nearest

_KEYS, _KEY = 16, 40
"""Fields of a line that an error names, and the characters of each."""


def json_lines(
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
        line, kind = decode(raw, reading.encoding)
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
