"""What may be said of a setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["proved", "neutral", "refused"]


class Named(str):
    """A value by its name, such as a dtype of torch, which this module does not load."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


DTYPES = tuple(map(Named, ("torch.float32", "torch.bfloat16", "torch.float64")))


@dataclass(frozen=True)
class Setting:
    """The verdict on one field of a Megatron configuration.

    Attributes:
        verdict: ``proved``: cases compare layouts with values other than the default. ``neutral``:
            what reads the field cannot make one layout differ from another. ``refused``: only
            the default is accepted.
        reason: what reads the field and what follows; one sentence, without the final stop.
        proofs: of a proved setting: ``covering:Class.field``, a setting that the covering list of
            :mod:`nemo_megacpp.proof` varies, or a test, ``tests/file.py::test_name``.
        legal: the values that are accepted, beside a default that is empty, a dtype by its
            :class:`Named`; None: all of a proved or neutral setting, the default alone of a
            refused one.
        otherwise: why other values than ``legal`` are refused; ``reason`` if empty.
        each: a list is accepted if each of its elements is.
    """

    verdict: Verdict
    reason: str
    proofs: tuple[str, ...] = ()
    legal: tuple[Any, ...] | None = None
    otherwise: str = ""
    each: bool = False

    def __post_init__(self) -> None:
        assert bool(self.proofs) == (self.verdict == "proved"), self
        assert self.verdict != "refused" or self.legal is None, self

    def accepts(self, value: Any, default: Any) -> bool:
        """Return whether ``value`` may be trained with. None, False, 0 and an empty list mean the
        same wherever Megatron has one of them as a default, and are legal there."""
        if not value and not default:
            return True
        if self.legal is None:
            return self.verdict != "refused" or value == default
        values = value if self.each and isinstance(value, list) else [value]
        return all(any(choice in (one, str(one)) for choice in self.legal) for one in values)


Table = Mapping[str, Setting]
"""Field -> verdict."""


def proved(
    reason: str,
    *proofs: str,
    legal: tuple[Any, ...] | None = None,
    otherwise: str = "",
    each: bool = False,
) -> Setting:
    """Return the verdict on a setting that cases vary."""
    return Setting("proved", reason, proofs, legal, otherwise, each)


def neutral(reason: str, legal: tuple[Any, ...] | None = None, otherwise: str = "") -> Setting:
    """Return the verdict on a setting that cannot make layouts differ."""
    return Setting("neutral", reason, legal=legal, otherwise=otherwise)


def refused(reason: str) -> Setting:
    """Return the verdict on a setting that must stay at its default."""
    return Setting("refused", reason)


def only_with(master: str) -> Setting:
    """Return the verdict on a setting that is read only where ``master``, a refused one, is on."""
    return neutral(f"Read only with {master}, which is refused")
