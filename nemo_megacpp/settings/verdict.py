"""The verdict on a setting, and the functions that tables of verdicts are written with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Verdict = Literal["proved", "neutral", "refused"]


class Named(str):
    """A value by its name, such as a dtype of torch, which this module does not load."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


_COVERED = ("covering",)
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


Table = dict[str, Setting]
"""Field -> verdict."""


def table(*parts: Table, configuration: str = "") -> Table:
    """Join tables of different fields, and complete the citations of :func:`covered`.

    Args:
        parts: the tables.
        configuration: name of the Megatron class whose fields these are.
    """
    joined: Table = {}
    for part in parts:
        assert not joined.keys() & part.keys(), joined.keys() & part.keys()
        joined |= part
    if configuration:
        for field, setting in joined.items():
            if setting.proofs == _COVERED:
                joined[field] = replace(setting, proofs=(f"covering:{configuration}.{field}",))
    return joined


def _same(fields: str, setting: Setting) -> Table:
    return dict.fromkeys(fields.split(), setting)


def proved(
    fields: str,
    reason: str,
    *proofs: str,
    legal: tuple[Any, ...] | None = None,
    otherwise: str = "",
    each: bool = False,
) -> Table:
    """Return the verdict on settings that cases vary.

    Args:
        fields: names, separated by spaces; so in the functions below.
        reason, proofs, legal, otherwise, each: as in :class:`Setting`.
    """
    return _same(fields, Setting("proved", reason, proofs, legal, otherwise, each))


def covered(fields: str, reason: str, **options: Any) -> Table:
    """Return the verdict on settings that the covering list of cases varies."""
    return proved(fields, reason, *_COVERED, **options)


def neutral(
    fields: str, reason: str, legal: tuple[Any, ...] | None = None, otherwise: str = ""
) -> Table:
    """Return the verdict on settings that cannot make layouts differ."""
    return _same(fields, Setting("neutral", reason, legal=legal, otherwise=otherwise))


def refused(fields: str, reason: str) -> Table:
    """Return the verdict on settings that must stay at their defaults."""
    return _same(fields, Setting("refused", reason))


def only_with(fields: str, master: str) -> Table:
    """Return the verdict on settings that are read only with ``master``, which is refused."""
    return neutral(fields, f"Read only with {master}, which is refused")
