"""A seeded campaign over kinds of faults: kinds take turns by the time that they have had."""

from __future__ import annotations

import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.faults.doors import Expected
from tests.faults.judge import Outcome
from tests.faults.kinds import Kind, Site
from tests.faults.workplace import Workplace

_STRIDE = 1_000_000


@dataclass
class Tally:
    """What a campaign found.

    Attributes:
        verdicts: number of tries by kind and verdict.
        seconds: by kind.
        moments: number of strikes by kind and by how far the command had come.
        failures: kind, seed and outcome of each try after which something did not hold.
    """

    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    moments: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[tuple[str, int, Outcome]] = field(default_factory=list)

    @property
    def tries(self) -> int:
        """All tries."""
        return self.verdicts.total()

    def table(self, kinds: Sequence[Kind]) -> str:
        """Return tries, verdicts and failures by kind."""
        columns = ("tries", "refused", "equal", "survived", "failures", "s/try")
        lines = [f"{'kind':<16}" + "".join(f"{column:>10}" for column in columns)]
        for name in (*(kind.name for kind in kinds), None):
            counts = [
                sum(
                    n
                    for (kind, found), n in self.verdicts.items()
                    if name in (kind, None) and found == v
                )
                for v in ("refused", "equal", "survived")
            ]
            tries = sum(counts)
            failures = sum(name in (kind, None) for kind, _, _ in self.failures)
            seconds = self.seconds.total() if name is None else self.seconds[name]
            cells = (tries, *counts, failures, f"{seconds / max(tries, 1):.2f}")
            lines.append(f"{name or 'all':<16}" + "".join(f"{cell:>10}" for cell in cells))
        lines += [
            f"{count:>6}  {kind}: {moment}"
            for (kind, moment), count in sorted(self.moments.items())
        ]
        return "\n".join(lines)


def seed_of(campaign: int, number: int) -> int:
    """Return the seed of a kind's try in a campaign; it does not depend on the other kinds."""
    return campaign * _STRIDE + number


def attempt(kind: Kind, seed: int, place: Workplace, expected: Expected) -> Outcome:
    """Make the try that ``seed`` names."""
    with place.own_folder() as folder:
        return kind.attempt(random.Random(f"{kind.name} {seed}"), Site(place, expected, folder))


def run_campaign(
    kinds: Sequence[Kind],
    place: Workplace,
    seed: int,
    *,
    tries: int | None = None,
    seconds: float | None = None,
    each: int | None = None,
    say: Callable[[str], object] = str,
) -> Tally:
    """Let the kind that has had the least time make the next try, until an end or Ctrl-C.

    Args:
        kinds: of faults.
        place: the intact inputs.
        seed: of the campaign.
        tries: of all kinds together.
        seconds: after which no try is begun.
        each: tries of each kind.
        say: called with a line about each failure, and now and then about the progress.
    """
    tally, expected, numbers = Tally(), Expected(), Counter[str]()
    started = told = time.monotonic()
    while True:
        waiting = [kind for kind in kinds if each is None or numbers[kind.name] < each]
        passed = time.monotonic() - started
        if not waiting or tally.tries == tries or (seconds is not None and passed >= seconds):
            return tally
        kind = min(waiting, key=lambda kind: tally.seconds[kind.name])
        own = seed_of(seed, numbers[kind.name])
        numbers[kind.name] += 1
        began = time.monotonic()
        try:
            outcome = attempt(kind, own, place, expected)
        except KeyboardInterrupt:
            say(f"interrupted in {kind.name}:{own}, which does not count")
            return tally
        except Exception:  # a campaign of hours goes on
            outcome = Outcome("", "refused", ["the try itself failed"], traceback.format_exc())
        tally.seconds[kind.name] += time.monotonic() - began
        tally.verdicts[kind.name, outcome.verdict] += 1
        if outcome.moment:
            tally.moments[kind.name, outcome.moment] += 1
        if outcome.wrong:
            tally.failures.append((kind.name, own, outcome))
            say(describe(kind.name, own, outcome))
        if time.monotonic() - told > 30:
            told = time.monotonic()
            say(f"{tally.tries} tries in {told - started:.0f} s, {len(tally.failures)} failures")


def describe(kind: str, seed: int, outcome: Outcome) -> str:
    """Return the lines about a try."""
    said = outcome.said.replace("\n", "\n      ")
    wrong = "".join(f"\n    {wrong}" for wrong in outcome.wrong)
    return f"{kind}:{seed}  {outcome.what}: {outcome.verdict}{wrong}\n      {said}"
