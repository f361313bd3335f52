"""What a kind of fault is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.doors import Door, Expected
from tests.faults.judge import Outcome, judge
from tests.faults.workplace import Workplace, fingerprint


@dataclass
class Site:
    """Where a try takes place.

    Attributes:
        place: the intact inputs.
        expected: results of the intact inputs.
        folder: of this try alone.
    """

    place: Workplace
    expected: Expected
    folder: Path

    def meet(
        self, door: Door, target: Path, what: str, intact: Path | None, refuse: bool = False
    ) -> Outcome:
        """Run a door on an injured input, and judge it.

        Args:
            door: the command.
            target: the injured input, which the command must not change.
            what: was injured.
            intact: the input whose result exit code 0 must have; None: any result is right.
            refuse: exit code 0 is wrong.
        """
        expected = None if intact is None else self.expected.of(door, self.place, intact)
        before = fingerprint(target)
        ended = door.open(self.place, target, self.folder, compare=expected is not None)
        outcome = judge(ended, self.place, f"{what}; {door.name}", expected=expected, refuse=refuse)
        if fingerprint(target) != before:
            outcome.wrong.append("the command changed its input")
        if ended.code == 2 and (self.folder / "out").exists():
            outcome.wrong.append("refused, and yet it made its output")
        return outcome


Attempt = Callable[[random.Random, Site], Outcome]


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: on the command line and in the table.
        attacks: what it does, in a line.
        attempt: one try; the same state of the generator gives the same try.
        heavy: it starts runs, which takes most of a minute; not part of ``make test``.
    """

    name: str
    attacks: str
    attempt: Attempt
    heavy: bool = False
