"""Which encoding text has, and what it decodes to."""

from __future__ import annotations

import codecs
from contextlib import suppress

from nemo_megacpp.errors import UserError, nearest

MAX_REPLACED = 0.1
"""A text with a larger share of undecodable characters is left out as not UTF-8."""

_BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


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


def wide_encoding(head: bytes, encoding: str | None) -> str | None:
    """Return the encoding of a file in UTF-16 or UTF-32, from its first 4 bytes; else None."""
    for mark, name in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return name
    return (
        encoding if encoding and encoding.startswith(("utf-16", "utf-32")) and 0 in head else None
    )


def decode(raw: bytes, encoding: str | None) -> tuple[str | None, str]:
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


def suggest_encoding(raw: bytes) -> str:
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
