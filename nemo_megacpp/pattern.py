"""The pattern language: a hybrid model's layers written as a string of letters.

``AEMEAEMEAEMR`` is a unit of twelve layers; tiled to 52 it is NAM56R. ``|`` marks a place where the
pipeline may be cut. Position ``i`` of a pattern is global layer ``i``, counted from 0. A family
that a user adds (:mod:`nemo_megacpp.families`) brings a letter of its own.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from nemo_megacpp.errors import UserError

CUT = "|"
_MEGATRON_SYMBOLS = {"A": "*", "F": "-"}
"""Letter -> symbol, where they differ."""
MAX_DEPTH = 65_536
"""Layers that a pattern is tiled to: a thousand times those of any model."""


@dataclass(frozen=True)
class Family:
    """A block family.

    Attributes:
        value: its letter in a pattern.
    """

    value: str

    ATTENTION: ClassVar[Family]
    MAMBA: ClassVar[Family]
    EXPERT: ClassVar[Family]
    RECURRENT: ClassVar[Family]
    FEED_FORWARD: ClassVar[Family]

    @property
    def long_name(self) -> str:
        """``ablock``, ``mblock``, ``eblock`` and ``rblock``, as in the articles, and ``fblock``."""
        return f"{self.value.lower()}block"

    @property
    def megatron_symbol(self) -> str:
        """The symbol in Megatron's ``hybrid_override_pattern``.

        ``*``, ``M``, ``E`` and ``-`` are those of Megatron-Core 0.16.1
        (``megatron/core/ssm/mamba_hybrid_layer_allocation.py``). Megatron has no recurrent layer:
        ``R`` is added by this package's stack, as are the letters of added families, and stock
        ``MambaStack`` refuses them.
        """
        return _MEGATRON_SYMBOLS.get(self.value, self.value)


Family.ATTENTION, Family.MAMBA = Family("A"), Family("M")
Family.EXPERT, Family.RECURRENT = Family("E"), Family("R")
Family.FEED_FORWARD = Family("F")

BUILT_IN = (
    Family.ATTENTION,
    Family.MAMBA,
    Family.EXPERT,
    Family.RECURRENT,
    Family.FEED_FORWARD,
)
_families: dict[str, Family] = {family.value: family for family in BUILT_IN}


def known_families() -> tuple[Family, ...]:
    """Return the built-in families, and after them those that were added."""
    return tuple(_families.values())


def add_family(letter: str) -> Family:
    """Make ``letter`` a family's letter in every pattern that this process reads from now on.

    Raises:
        UserError: it is no upper-case ASCII letter, or a built-in family's.
    """
    if not (len(letter) == 1 and letter.isascii() and letter.isupper()):
        raise UserError(f"A block family's letter is one of A to Z; got {letter!r}.")
    if any(family.value == letter for family in BUILT_IN):
        taken = ", ".join(family.value for family in BUILT_IN)
        raise UserError(f"The letters {taken} are taken; choose another one than {letter!r}.")
    return _families.setdefault(letter, Family(letter))


def _long_names() -> re.Pattern[str]:
    letters = "".join(_families)
    return re.compile(rf"(?<![a-z])([{letters}])block(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class HybridPattern:
    """The families of all layers, and the explicit pipeline cuts.

    Attributes:
        families: one family per layer, ``len(families)`` = depth.
        cuts: global layer indices before which a new pipeline chunk starts, strictly increasing,
            ``0 < cut < depth``. Empty: the pipeline divides the depth equally.

    Raises:
        UserError: no layers, or cuts out of order or out of range.
    """

    families: tuple[Family, ...]
    cuts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.families:
            raise UserError("A pattern needs at least one layer.")
        edges = (0, *self.cuts, len(self.families))
        if any(low >= high for low, high in pairwise(edges)):
            raise UserError(
                f"Pipeline cuts must be strictly increasing, between 1 and "
                f"{len(self.families) - 1} for {len(self.families)} layers; got {self.cuts}."
            )

    @classmethod
    def parse(cls, text: str, depth: int | None = None) -> HybridPattern:
        """Read a pattern, and tile it to ``depth`` layers if a depth is given.

        Args:
            text: letters A, M, E, R, F in either case, Megatron's ``*`` for A and ``-`` for F, or
                the long names (``ablock, eblock``); whitespace is ignored, ``|`` is a pipeline cut.
            depth: number of layers. ``text`` is then a unit that repeats, with its cuts, until
                ``depth`` layers exist; the last repeat is truncated. A ``|`` at the unit's end cuts
                after each repeat; one that falls on the end of the stack separates nothing and is
                left out.

        Raises:
            UserError: an unknown letter, a cut that separates nothing, no layers, or a depth below
                the unit's length (a family of the unit could vanish).
        """
        unit, cuts = _scan(text, tiled=depth is not None)
        if depth is None:
            return cls(unit, cuts)
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise UserError(f"The depth must be a positive number of layers; got {depth!r}.")
        if depth > MAX_DEPTH:
            raise UserError(f"A depth of {depth:,} is more than {MAX_DEPTH:,} layers.")
        if depth < len(unit):
            raise UserError(
                f"A depth of {depth} cuts short the unit {_join(unit, cuts)!r} of {len(unit)} "
                f"layers, and a family could vanish. Use a depth of at least {len(unit)}, or write "
                f"the shorter pattern out."
            )
        repeats = -(-depth // len(unit))
        return cls(
            (unit * repeats)[:depth],
            tuple(
                position
                for repeat in range(repeats)
                for cut in cuts
                if (position := repeat * len(unit) + cut) < depth
            ),
        )

    @classmethod
    def from_megatron(cls, text: str) -> HybridPattern:
        """Read Megatron's symbols (``*``, ``M``, ``E``, ``-``, our ``R``, and ``|``), as
        `to_megatron` writes them. They have one case; the letters ``A`` and ``F`` are not among
        them.

        Raises:
            UserError: as `parse`, for any other symbol.
        """
        return cls(*_scan(text, megatron=True))

    def to_megatron(self, *, cuts: bool = False) -> str:
        """Megatron's ``hybrid_override_pattern``: one symbol per layer.

        Args:
            cuts: write ``|`` at the cuts. Megatron-Core 0.16.1 counts characters as layers and does
                not know ``|``, so it gets the form without.
        """
        return _join(self.families, self.cuts if cuts else (), megatron=True)

    @property
    def letters(self) -> str:
        """One upper-case letter per layer, without cuts."""
        return _join(self.families, ())

    def __str__(self) -> str:
        """The canonical form: upper-case letters with cuts. `parse` reads it back."""
        return _join(self.families, self.cuts)

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.families)

    def counts(self) -> dict[Family, int]:
        """The number of layers of each built-in family, zeros included, and of others that are
        there."""
        families = dict.fromkeys((*BUILT_IN, *self.families))
        return {family: self.families.count(family) for family in families}

    def chunks(self, n: int) -> tuple[range, ...]:
        """The global layer indices of each of ``n`` pipeline chunks, in depth order.

        Args:
            n: pipeline stages times virtual stages.

        One chunk is always legal: a cut is a place where the pipeline may be cut, so a model with
        cuts still loads on a single rank. For more, explicit cuts must make exactly ``n`` chunks;
        without them ``n`` must divide the depth. Nothing is rounded; Megatron-Core 0.16.1 silently
        builds only ``n * (depth // n)`` layers.

        Raises:
            UserError: ``n`` chunks cannot be made; names the legal numbers.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise UserError(f"The number of pipeline chunks must be a positive integer; got {n!r}.")
        depth = len(self)
        if n == 1:
            return (range(depth),)
        if self.cuts:
            chunks = _ranges((0, *self.cuts, depth))
            if len(chunks) != n:
                raise UserError(
                    f"The pattern is cut into {len(chunks)} pipeline chunks "
                    f"({_sizes(chunks)} layers), but the layout has {n} (pipeline x virtual "
                    f"stages). Legal: 1 or {len(chunks)}; or write {n - 1} cuts "
                    f"({CUT!r}) instead of {len(self.cuts)}."
                )
            return chunks
        if depth % n == 0:
            return _ranges(tuple(range(0, depth + 1, depth // n)))
        raise UserError(
            f"{depth} layers cannot be divided into {n} equal pipeline chunks. "
            f"Legal numbers of chunks: {', '.join(map(str, _divisors(depth)))}{self._advice(n)}"
        )

    def _advice(self, n: int) -> str:
        if n > len(self):
            return "."
        edges = _balanced(len(self), n)
        return (
            f"; or choose the cuts yourself, for example {_join(self.families, edges[1:-1])!r} "
            f"({_sizes(_ranges(edges))} layers)."
        )


def _scan(
    text: str, *, megatron: bool = False, tiled: bool = False
) -> tuple[tuple[Family, ...], tuple[int, ...]]:
    """Return the families of ``text`` and its cuts. A unit to be tiled may end with a cut."""
    if not isinstance(text, str):
        raise UserError(f"A pattern is a string such as 'AEME'; got {type(text).__name__}.")
    alphabet = {family.megatron_symbol: family for family in known_families()}
    if not megatron:
        alphabet |= {family.value: family for family in known_families()}
        alphabet |= {family.value.lower(): family for family in known_families()}
    long_names = _long_names()
    families: list[Family] = []
    cuts: list[int] = []
    position, last, last_at = 0, "", 0
    while position < len(text):
        char = text[position]
        long_name = None if megatron else long_names.match(text, position)
        if char.isspace():
            position += 1
            continue
        if long_name:
            families.append(alphabet[long_name[1]])
        elif char in alphabet:
            families.append(alphabet[char])
        elif char == CUT:
            if not families:
                raise _error(text, position, "The first pipeline chunk is empty")
            if last == CUT:
                raise _error(text, position, "A pipeline chunk is empty")
            cuts.append(len(families))
        elif char == "," and not megatron:
            if last in ("", ","):
                raise _error(text, position, "A layer is missing before this comma")
        else:
            raise _error(text, position, *_unknown(char, megatron))
        last, last_at = char, position
        position += len(long_name[0]) if long_name else 1
    if not families:
        raise UserError("pattern is empty; give letters, for example pattern=AEMR.")
    if last == CUT and not tiled:
        raise _error(text, last_at, "The last pipeline chunk is empty")
    return tuple(families), tuple(cuts)


_LOOKS_LIKE = str.maketrans(
    "АВЕКМНОРСТХ" + "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "ABEKMHOPCTX" + "ABEZHIKMNOPTYX",
)
"""Cyrillic and Greek letters -> the Latin ones that look like them."""


def _unknown(char: str, megatron: bool) -> tuple[str, str]:
    letters = ", ".join(
        f"{symbol} ({family.long_name})"
        for family in known_families()
        for symbol in [family.megatron_symbol if megatron else family.value]
    )
    legal = f"Legal letters: {letters}, and {CUT!r} for a pipeline cut."
    if char == "A":
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


def _join(families: tuple[Family, ...], cuts: tuple[int, ...], *, megatron: bool = False) -> str:
    return "".join(
        (CUT if index in cuts else "") + (family.megatron_symbol if megatron else family.value)
        for index, family in enumerate(families)
    ) + (CUT if len(families) in cuts else "")


def _ranges(edges: tuple[int, ...]) -> tuple[range, ...]:
    return tuple(range(low, high) for low, high in pairwise(edges))


def _sizes(chunks: tuple[range, ...]) -> str:
    return "+".join(str(len(chunk)) for chunk in chunks)


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def _balanced(depth: int, n: int) -> tuple[int, ...]:
    """Edges of ``n`` chunks whose sizes differ by one at most.

    The larger ones go to the middle: the first and last stages also hold embedding, head and loss.
    """
    size, extra = divmod(depth, n)
    first = (n - extra) // 2
    edges = [0]
    for chunk in range(n):
        edges.append(edges[-1] + size + (first <= chunk < first + extra))
    return tuple(edges)
