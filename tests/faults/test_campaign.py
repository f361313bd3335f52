"""A seeded slice of the campaign; ``python -m tests.faults --hours 1`` is the whole."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.campaign import attempt, describe, run_campaign, seed_of
from tests.faults.catalog import KINDS
from tests.faults.doors import Expected
from tests.faults.judge import Outcome
from tests.faults.kinds import Kind, Site
from tests.faults.workplace import Workplace

pytestmark = pytest.mark.processes

_LIGHT = [kind for kind in KINDS if not kind.heavy and kind.name != "kill-save"]
"""Kills across saves have a test of their own."""
_SEED = 57
"""With commands that take little time."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    made = Workplace(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected() -> Expected:
    return Expected()


@pytest.mark.parametrize("kind", _LIGHT, ids=lambda kind: kind.name)
def test_nothing_is_lost_run_or_raised(kind: Kind, place: Workplace, expected: Expected) -> None:
    seed = seed_of(_SEED, 0)
    outcome = attempt(kind, seed, place, expected)
    assert not outcome.wrong, describe(kind.name, seed, outcome)


def test_a_campaign_counts_and_names_what_failed(place: Workplace) -> None:
    """Kinds take turns by time, and a failure is told with the seed that repeats it."""

    def draw(draw: random.Random, site: Site) -> Outcome:
        number = draw.randrange(1000)
        return Outcome(f"drew {number}", "equal", ["odd"] if number % 2 else [])

    kinds = [Kind("one", "draws", draw), Kind("two", "draws", draw)]
    said: list[str] = []
    tally = run_campaign(kinds, place, seed=3, tries=10, say=said.append)
    assert tally.tries == 10
    assert {kind for kind, _ in tally.verdicts} == {"one", "two"}
    assert len(said) == len(tally.failures) > 0
    name, seed, outcome = tally.failures[0]
    again = attempt(next(kind for kind in kinds if kind.name == name), seed, place, Expected())
    assert again == outcome
    assert f"{name}:{seed}  {outcome.what}" in said[0]
    assert tally.table(kinds).splitlines()[-1].split()[:2] == ["all", "10"]


def test_code_that_runs_and_code_that_hangs_are_seen(place: Workplace, tmp_path: Path) -> None:
    """The judge itself, on a command that does what none may do."""
    from tests.faults.judge import judge

    ended = place.forks.run(
        None, cwd=tmp_path, then=_misbehave, given=(str(place.canary),), timeout=1.0
    )
    wrong = judge(ended, place, "misbehaves").wrong
    assert any(line.startswith("hangs") for line in wrong)
    assert "code ran: ['ran']" in wrong
    assert any(line.startswith("control characters on stdout") for line in wrong)
    assert "a traceback on stderr" in wrong


def _misbehave(canary: str) -> None:
    import sys
    import time

    (Path(canary) / "ran").mkdir()
    print("\x1b[2J", flush=True)
    print("Traceback (most recent call last):", file=sys.stderr, flush=True)
    time.sleep(60)
