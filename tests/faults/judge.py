"""What must hold after every try."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.faults.forks import Ended
from tests.faults.workplace import Workplace

MOST_LINES = 50
MOST_CHARACTERS = 5000
"""On stderr: a message of 40 lines or 4,000 characters, and what was said before it."""

Verdict = Literal["refused", "equal", "survived"]
"""``refused``: exit code 2 and one message; ``equal``: exit code 0, with the result of the intact
input where there is one; ``survived``: a command was struck, and all that it promised holds."""


@dataclass
class Outcome:
    """What a try found.

    Attributes:
        what: was injured, and at which door.
        verdict: how the command took it.
        wrong: what did not hold.
        said: the end of the command's message.
        moment: how far a command had come when it was struck.
    """

    what: str
    verdict: Verdict
    wrong: list[str] = field(default_factory=list)
    said: str = ""
    moment: str = ""


def judge(
    ended: Ended,
    place: Workplace,
    what: str,
    *,
    expected: Any = None,
    refuse: bool = False,
    codes: Sequence[int] = (0, 2),
    silent: bool = False,
    temporary: bool = True,
) -> Outcome:
    """Judge a command that met a damaged or hostile input.

    Args:
        ended: the command.
        place: whose canary tells whether code ran.
        what: for the outcome.
        expected: result of the intact input, which exit code 0 must have; None: not compared.
        refuse: exit code 0 is wrong.
        codes: legal exit codes.
        silent: it may end without a message, because it was killed.
        temporary: it must leave nothing in its temporary folder, which a kill may not let it.
    """
    wrong = _unruly(ended)
    if ended.code is None:
        wrong.append(f"hangs: ended by the time limit after {ended.seconds:.0f} s")
    elif ended.code not in codes:
        wrong.append(f"exit code {ended.code}")
    elif ended.code and not silent and not ended.err.strip():
        wrong.append(f"exit code {ended.code} without a message")
    if ended.code == 0 and refuse:
        wrong.append("accepted")
    if ended.code == 0 and expected is not None and ended.result != expected:
        wrong.append(f"accepted with another result: {_difference(ended.result, expected)}")
    if temporary and ended.temporary:
        wrong.append(f"left in the temporary folder: {', '.join(ended.temporary[:3])}")
    if ran := place.ran():
        wrong.append(f"code ran: {ran}")
    said = "\n".join(ended.err.strip().splitlines()[-6:])[-800:]
    return Outcome(what, "equal" if ended.code == 0 else "refused", wrong, said)


def _unruly(ended: Ended) -> list[str]:
    wrong = [*unruly_text("stdout", ended.out), *unruly_text("stderr", ended.err)]
    lines = ended.err.splitlines()
    if len(lines) > MOST_LINES or len(ended.err) > MOST_CHARACTERS:
        wrong.append(f"a message of {len(lines)} lines, {len(ended.err):,} characters")
    if ended.left:
        wrong.append(f"processes left: {'; '.join(ended.left[:3])}")
    return wrong


def unruly_text(name: str, text: str) -> list[str]:
    """Return what a command must not write."""
    wrong = []
    if "Traceback (most recent call last)" in text:
        wrong.append(f"a traceback on {name}")
    if found := sorted({c for c in text if _steers(c)}):
        wrong.append(f"control characters on {name}: {found[:5]}")
    return wrong


def _steers(character: str) -> bool:
    """Whether a character moves a terminal's cursor or the direction of its text."""
    return (
        unicodedata.category(character) == "Cc" and character not in "\n\t\r"
    ) or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _difference(found: Any, expected: Any) -> str:
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return "another kind of result"
    different = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
    return f"{len(different)} of {len(expected)}: {', '.join(map(repr, different[:3]))}"[:300]
