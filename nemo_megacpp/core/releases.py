"""Which releases of Megatron-Core are proved, tried and refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from nemo_megacpp.errors import UserError

Standing = Literal["proved", "tried", "refused"]

PROVED = ("0.16.1", "0.19.2")
"""The proof runs on these: ``make test`` on the first, ``make test-core-new`` on the second."""
SERIES = tuple(release.rpartition(".")[0] for release in PROVED)
"""Other releases of the same series differ in fixes only; they are tried."""
_NUMBERS = re.compile(r"(\d+)\.(\d+)")


@dataclass(frozen=True)
class Release:
    """A release of Megatron-Core and where it stands.

    Attributes:
        text: its version.
        standing: ``proved``, ``tried`` (a series of which another release is proved) or
            ``refused``.
    """

    text: str
    standing: Standing

    @property
    def series(self) -> str:
        """Major and minor number."""
        return series_of(self.text)


def series_of(release: str) -> str:
    """Return major and minor number of a version: ``0.16`` of ``0.16.1``."""
    match = _NUMBERS.match(release)
    return match[0] if match else release


def standing_of(release: str) -> Standing:
    """Return where a version of Megatron-Core stands."""
    if release in PROVED:
        return "proved"
    return "tried" if series_of(release) in SERIES else "refused"


def supported() -> str:
    """Return what is supported, as one phrase for messages."""
    return (
        f"proved: {' and '.join(PROVED)}; tried: the other releases of {' and '.join(SERIES)}; "
        f"refused: every other"
    )


def imported() -> str:
    """Return the version of the Megatron-Core that this process imports: the installed one, or
    that of a checkout that is searched before it.

    From 0.19 on Megatron appends the commit of the Git repository that its files are in, which for
    an environment inside a checkout of something else, as those of the Makefile, is not its own.
    """
    from megatron.core import __version__ as text

    return text.partition("+")[0]


def is_at_least(series: str) -> bool:
    """Return whether the imported Megatron-Core is of a series or of a later one, for what neither
    a signature nor a field shows."""
    return _numbers(imported()) >= _numbers(series)


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, series_of(release).split(".")))


@cache
def installed() -> Release | None:
    """Return the installed Megatron-Core, None without one."""
    try:
        text = version("megatron-core")
    except PackageNotFoundError:
        return None
    return Release(text, standing_of(text))


def require_supported() -> None:
    """Refuse to build a model on a Megatron-Core that nothing here was written for.

    Raises:
        UserError: the release is refused.
    """
    text = imported()
    if standing_of(text) == "refused":
        raise UserError(
            f"Megatron-Core {text} is not supported ({supported()}). Install one of them; "
            f"docs/versions.md says which NeMo, Python and container go with each."
        )
