"""Block families as patterns hold them: letters, and Megatron's symbols for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nemo_megacpp.errors import UserError

_MEGATRON_SYMBOLS = {"A": "*", "F": "-"}
"""Letter -> symbol, where they differ."""


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
        """The symbol in Megatron's patterns.

        ``*``, ``M``, ``E`` and ``-`` are Megatron's own. It has no recurrent layer: ``R`` and the
        letters of added families are read by this package's stack in a
        ``hybrid_override_pattern``; stock ``MambaStack`` refuses them. In a
        ``hybrid_layer_pattern`` Megatron itself refuses them (:attr:`is_megatrons`).
        """
        return _MEGATRON_SYMBOLS.get(self.value, self.value)

    @property
    def is_megatrons(self) -> bool:
        """Whether ``hybrid_layer_pattern`` has a symbol for it."""
        return self.value in ("A", "M", "E", "F")


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
