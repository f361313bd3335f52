"""``kill -9`` of one rank and of all in the midst of a save: a seeded handful.

``python -m tests.faults --kinds kill-save`` does the same at length.
"""

from __future__ import annotations

import random
from pathlib import Path

from nemo_megacpp.runtime.workers import WorkerPool
from tests.faults.saves import KilledSaves


def test_a_killed_save_harms_nothing(ranks: WorkerPool, tmp_path: Path) -> None:
    saves, points = KilledSaves(ranks, tmp_path), random.Random(20)
    landed = []
    while len(landed) < 5:
        strike = saves.strike(points)
        assert not strike.wrong, strike
        landed += [strike.kill.victims] * strike.landed
    assert set(landed) == {"one", "all"}
