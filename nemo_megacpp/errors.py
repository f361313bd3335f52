"""The exceptions that are meant for a person."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """What a user asked for cannot be done.

    The message stands alone: what is wrong, the numbers, the legal choices. The command line prints
    it without a traceback and exits with code 2.
    """


class RankFailed(RuntimeError):
    """A rank ended with an error, which the message tells; the command line prints no more than it.

    Attributes:
        user_error: whether the rank had refused what the user asked for: exit code 2, else 1.
    """

    def __init__(self, message: str, user_error: bool = False):
        super().__init__(message)
        self.user_error = user_error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest of ``known``, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
