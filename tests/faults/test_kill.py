"""``kill -9`` of one rank and of all in the midst of a save: a seeded handful.

``python -m tests.faults --kills 100`` does the same at length.
"""

from __future__ import annotations

from pathlib import Path

from nemo_megacpp.runtime.workers import WorkerPool
from tests.faults.campaign import run_campaign


def test_a_killed_save_harms_nothing(ranks: WorkerPool, tmp_path: Path) -> None:
    tally = run_campaign(ranks, tmp_path, kills=5, seed=20)
    assert not tally.wrong
    assert tally.kills == 5
    assert {victims for victims, _ in tally.landed} == {"one", "all"}
