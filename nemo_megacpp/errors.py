"""The exceptions that are meant for a person."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches


class UserError(ValueError):
    """What a user asked for cannot be done.

    The message stands alone: what is wrong, the numbers, the legal choices. The command line prints
    it without a traceback and exits with code 2.
    """


class Violations(UserError):
    """Several things that a user asked for cannot be done; the message lists all of them.

    Attributes:
        messages: one for each.
    """

    def __init__(self, messages: Sequence[str]):
        indented = [message.replace("\n", "\n   ") for message in messages]
        listed = "\n".join(f"  {number}. {text}" for number, text in enumerate(indented, start=1))
        super().__init__(f"{len(messages)} settings are invalid:\n{listed}")
        self.messages = tuple(messages)


def raise_violations(messages: Iterable[str]) -> None:
    """Raise a UserError that names every violation; do nothing if there are none."""
    found = list(dict.fromkeys(messages))
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        raise Violations(found)


def validate_all(*checks: Callable[[], object]) -> None:
    """Run every check, and raise one UserError for what all of them found.

    Args:
        checks: functions that raise a UserError.
    """
    found: list[str] = []
    for check in checks:
        try:
            check()
        except Violations as violations:
            found += violations.messages
        except UserError as error:
            found.append(str(error))
    raise_violations(found)


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
