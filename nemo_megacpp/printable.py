"""Foreign text on its way to a terminal, a log or a page: escaped, and no longer than a screen."""

from __future__ import annotations

import re
import reprlib
import sys

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
"""Control characters but tab and newline, line separators, what turns the direction of the text
around, and lone surrogates, which no encoding writes."""
_LINES = 40
_CHARACTERS = 4000
_VALUE = 80

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = _VALUE
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxdict, _short.maxset = 3, 6, 6, 6, 6


def printable(text: str) -> str:
    """Return ``text`` with control characters written as Python's escapes, such as ``\\x1b``."""
    return _UNPRINTABLE.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


def shown(value: object, most: int = _VALUE) -> str:
    """Return a foreign value as it stands in a message: a text quoted, at most ``most`` characters,
    lists and mappings with their first items; the time does not depend on the value's size."""
    _short.maxstring = most
    try:
        text = _short.repr(value)
    except ValueError:  # Python does not write a number of thousands of digits
        text = f"a number of {value.bit_length():,} bits" if isinstance(value, int) else "a value"
    return cut(printable(text), 2 * most)


def cut(text: str, most: int = _VALUE) -> str:
    """Return at most ``most`` characters, and how many more there were."""
    left = len(text) - most
    return text if left <= 0 else f"{text[:most]}… {left:,} more characters"


def screenful(message: str) -> str:
    """Return a message for a terminal: printable, at most 40 lines and 4,000 characters."""
    text = printable(message)
    kept = "\n".join(text[:_CHARACTERS].split("\n")[:_LINES])
    left = len(text) - len(kept)
    return f"{kept}… {left:,} more characters" if left else text


def say(text: str, *, error: bool = False) -> None:
    """Print a line with foreign names in it, printable, at once."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)
