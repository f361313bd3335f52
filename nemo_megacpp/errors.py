"""The exceptions that are shown to users."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

_LONGEST = 200
"""Characters of a name that is looked up."""


class UserError(ValueError):
    """A request that cannot be met.

    The message stands alone: what is wrong, the numbers, the legal choices. The command line prints
    it without a traceback and exits with code 2.
    """

    @property
    def messages(self) -> tuple[str, ...]:
        """One message for each thing that is wrong."""
        return (str(self),)


class Violations(UserError):
    """Several things are wrong with a request; the message lists all of them.

    Args:
        messages: one for each thing; or the whole message, with which Megatron's ``build_module``
            raises an exception again to say where it was.
    """

    def __init__(self, messages: Sequence[str] | str):
        if isinstance(messages, str):
            super().__init__(messages)
            self._messages: tuple[str, ...] = (messages,)
            return
        indented = [message.replace("\n", "\n   ") for message in messages]
        listed = "\n".join(f"  {number}. {text}" for number, text in enumerate(indented, start=1))
        super().__init__(f"{len(messages)} settings are invalid:\n{listed}")
        self._messages = tuple(messages)

    @property
    def messages(self) -> tuple[str, ...]:
        """One message for each thing that is wrong."""
        return self._messages


def raise_violations(messages: Iterable[str]) -> None:
    """Raise a UserError that names every violation; do nothing if there are none."""
    found = list(dict.fromkeys(messages))
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        raise Violations(found)


@contextmanager
def collect_violations(messages: list[str]) -> Iterator[None]:
    """Catch a UserError of the block and add what it says to ``messages``."""
    try:
        yield
    except UserError as error:
        messages += error.messages


def validate_all(*checks: Callable[[], object]) -> None:
    """Call every check, and raise one UserError with everything that they found."""
    messages: list[str] = []
    for check in checks:
        with collect_violations(messages):
            check()
    raise_violations(messages)


class RankFailed(RuntimeError):
    """A rank ended with an error; the command line prints the message alone.

    Attributes:
        user_error: whether the rank raised a UserError: exit code 2, else 1.
    """

    def __init__(self, message: str, user_error: bool = False):
        super().__init__(message)
        self.user_error = user_error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest of ``known``, or an empty string."""
    close = get_close_matches(name[:_LONGEST], list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
