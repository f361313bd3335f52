"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "limited", "broken"]


@dataclass(frozen=True)
class Finding:
    """What was found of one part.

    Attributes:
        part: its name.
        found: a version, a number, a place.
        status: ``ok``; ``limited``: something is slower or unavailable for that; ``broken``:
            nothing can be trained until it is fixed.
        cost: what the missing or broken part costs, and what would bring it.
    """

    part: str
    found: str
    status: Status = "ok"
    cost: str = ""
