"""The text of patterns: ours, and Megatron's two languages."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from nemo_megacpp.errors import UserError
from nemo_megacpp.pattern.family import Family, known_families

CUT = "|"
MTP = "/"
MegatronArgument = Literal["hybrid_override_pattern", "hybrid_layer_pattern"]
"""Megatron's two languages, by the argument that takes them: ``hybrid_override_pattern`` is that of
Megatron-Core 0.16 (``megatron/core/ssm/mamba_hybrid_layer_allocation.py``), and
``hybrid_layer_pattern`` that of 0.17 to 0.19
(``megatron/core/models/hybrid/hybrid_layer_allocation.py``)."""
_MEGATRON_ONLY = {
    "G": "Gated DeltaNet (from 0.17)",
    "D": "DeepSeek sparse attention (from 0.18)",
    "+": "multi-latent attention (from 0.19)",
}
"""Symbols of ``hybrid_layer_pattern`` for layers that no built-in family is."""


def scan(
    text: str, *, megatron: MegatronArgument | None = None, tiled: bool = False
) -> tuple[tuple[Family, ...], tuple[int, ...], tuple[Family, ...], int]:
    """Return the fields of the pattern. A unit to be tiled may end with a cut."""
    if not isinstance(text, str):
        raise UserError(f"A pattern is a string such as 'AEME'; got {type(text).__name__}.")
    alphabet = _alphabet(megatron)
    long_names = _long_names()
    parts: list[list[Family]] = [[]]
    starts: list[int] = [0]
    cuts: list[int] = []
    position, last, last_at = 0, "", 0
    while position < len(text):
        char = text[position]
        long_name = None if megatron else long_names.match(text, position)
        if char.isspace():
            position += 1
            continue
        if long_name:
            parts[-1].append(alphabet[long_name[1]])
        elif char in alphabet:
            parts[-1].append(alphabet[char])
        elif char == CUT:
            if len(parts) > 1:
                raise _error(text, position, "Prediction depths are on the last stage: no cut here")
            if not parts[0]:
                raise _error(text, position, "The first pipeline chunk is empty")
            if last == CUT:
                raise _error(text, position, "A pipeline chunk is empty")
            cuts.append(len(parts[0]))
        elif char == MTP and megatron != "hybrid_override_pattern":
            _end_part(text, position, parts, last == CUT and not tiled)
            parts.append([])
            starts.append(position + 1)
        elif char == "," and not megatron:
            if last in ("", ","):
                raise _error(text, position, "A layer is missing before this comma")
        else:
            raise _error(text, position, *_unknown(char, megatron))
        last, last_at = char, position
        position += len(long_name[0]) if long_name else 1
    if parts == [[]]:
        raise UserError("pattern is empty; give letters, for example pattern=AEMR.")
    _end_part(text, last_at, parts, last == CUT and not tiled)
    for start, part in zip(starts[2:], parts[2:], strict=True):
        if part != parts[1]:
            raise _error(text, start, "Every prediction depth has the layers of the first one")
    return tuple(parts[0]), tuple(cuts), tuple((parts[1:] or [[]])[0]), len(parts) - 1


def _long_names() -> re.Pattern[str]:
    letters = "".join(family.value for family in known_families())
    return re.compile(rf"(?<![a-z])([{letters}])block(?![a-z])", re.IGNORECASE)


def _alphabet(megatron: MegatronArgument | None) -> dict[str, Family]:
    """Return what may be written for a layer."""
    symbols = {family.megatron_symbol: family for family in known_families()}
    if megatron == "hybrid_layer_pattern":
        return {symbol: family for symbol, family in symbols.items() if family.is_megatrons}
    if megatron:
        return symbols
    letters = {family.value: family for family in known_families()}
    return symbols | letters | {letter.lower(): family for letter, family in letters.items()}


def _end_part(text: str, position: int, parts: list[list[Family]], after_a_cut: bool) -> None:
    if not parts[-1]:
        place = "in this prediction depth" if parts[1:] else "before the first prediction depth"
        raise _error(text, position, f"There are no layers {place}")
    if after_a_cut:
        raise _error(text, position, "The last pipeline chunk is empty")


_LOOKS_LIKE = str.maketrans(
    "АВЕКМНОРСТХ" + "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "ABEKMHOPCTX" + "ABEZHIKMNOPTYX",
)
"""Cyrillic and Greek letters -> the Latin ones that look like them."""


def _unknown(char: str, megatron: MegatronArgument | None) -> tuple[str, str]:
    letters = ", ".join(
        f"{family.megatron_symbol if megatron else family.value} ({family.long_name})"
        for family in known_families()
        if megatron != "hybrid_layer_pattern" or family.is_megatrons
    )
    known = {family.value: family for family in known_families()}
    legal = f"Legal letters: {letters}, and {CUT!r} for a pipeline cut."
    if char in _MEGATRON_ONLY:
        legal = (
            f"In Megatron's hybrid_layer_pattern it is {_MEGATRON_ONLY[char]}, for which there is "
            f"no family here. {legal}"
        )
    elif char == MTP:
        legal = f"Multi-token prediction is part of hybrid_layer_pattern, from 0.17 on. {legal}"
    elif megatron and char in known and not known[char].is_megatrons:
        legal = f"Megatron's hybrid_layer_pattern has no symbol for this package's {char}. {legal}"
    elif char == "A":
        legal += " Megatron writes attention as '*'."
    elif char == "F":
        legal += " Megatron writes an MLP layer as '-'."
    shown = repr(char)
    if not char.isascii():
        shown += f" (U+{ord(char):04X})"
        latin = unicodedata.normalize("NFKC", char).upper().translate(_LOOKS_LIKE)
        if latin.isascii() and latin.isalpha():
            legal = f"Write the Latin letter {latin}. {legal}"
    return f"{shown} is not a letter of the pattern", legal


def _error(text: str, position: int, problem: str, advice: str = "") -> UserError:
    # A pattern may come from a folded YAML block: one line keeps the caret under its letter.
    line = "".join(" " if char.isspace() else char for char in text)
    return UserError(
        f"{problem} (position {position + 1}):\n  {line}\n  {' ' * position}^"
        + (f"\n{advice}" if advice else "")
    )


def join(families: tuple[Family, ...], cuts: tuple[int, ...], *, megatron: bool = False) -> str:
    return "".join(
        (CUT if index in cuts else "") + (family.megatron_symbol if megatron else family.value)
        for index, family in enumerate(families)
    ) + (CUT if len(families) in cuts else "")
