"""Cuts are checked against every possible choice, on patterns short enough to try them all."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from nemo_megacpp.contract.pipeline_cuts import Weight, choose_cuts, is_seam, work_weight

WORK = {"A": 88, "E": 99, "M": 86, "R": 91, "embedding": 1, "head": 470}


def _chunks(letters: str, cuts: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(pairwise((0, *cuts, len(letters))))


def _score(letters: str, cuts: tuple[int, ...] | None, weight: Weight) -> tuple[int, ...]:
    """The documented order of preference, to be minimised."""
    assert cuts is not None
    chunks = _chunks(letters, cuts)
    weights = [weight(index, *chunk) for index, chunk in enumerate(chunks)]
    return (
        sum(is_seam(letters, cut) for cut in cuts),
        max(weights),
        max(letters[first:end].count("R") for first, end in chunks),
        sum(letters[cut] in "EF" for cut in cuts),
        sum(value**2 for value in weights),
    )


@pytest.mark.parametrize("seed", range(40))
def test_cuts_are_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    letters = "".join(rng.choices("AMERF", k=rng.randint(2, 11)))
    chunks = rng.randint(1, len(letters))
    work = {letter: rng.randint(1, 9) for letter in "AMERF"}
    work |= {"embedding": rng.randint(0, 9), "head": 20}
    weight = work_weight(letters, chunks, work)
    cuts = choose_cuts(letters, chunks, weight)
    best = min(
        _score(letters, other, weight) for other in combinations(range(1, len(letters)), chunks - 1)
    )
    assert _score(letters, cuts, weight) == best


def test_weights_that_differ_by_stage() -> None:
    """As memory does, of which the first stages keep more microbatches."""
    letters = "AEMEAEMEAEMR"

    def weight(stage: int, first: int, end: int) -> int:
        return (end - first) * (4 - stage)

    cuts = choose_cuts(letters, 4, weight)
    assert _score(letters, cuts, weight)[:2] == min(
        _score(letters, other, weight)[:2] for other in combinations(range(1, 12), 3)
    )


def test_no_cut_inside_a_run_of_experts_or_of_recurrences() -> None:
    letters = "AEEERRRA"
    for chunks in range(2, 5):
        cuts = choose_cuts(letters, chunks, work_weight(letters, chunks, WORK))
        assert cuts and not any(is_seam(letters, cut) for cut in cuts)
    # Only three places are no seam: a fifth chunk must slice one run, and slices no more.
    cuts = choose_cuts(letters, 5, work_weight(letters, 5, WORK))
    assert cuts and sum(is_seam(letters, cut) for cut in cuts) == 1


def test_the_head_takes_the_place_of_layers() -> None:
    letters = ("AEMEAEMEAEMR" * 5)[:52]
    cuts = choose_cuts(letters, 4, work_weight(letters, 4, WORK))
    assert cuts is not None
    sizes = [end - first for first, end in _chunks(letters, cuts)]
    assert sum(sizes) == 52
    assert sizes[-1] == min(sizes) < 13


def test_limits_and_impossible_cuts() -> None:
    weight = work_weight("AEMR", 2, WORK)
    assert choose_cuts("AEMR", 5, weight) is None
    assert choose_cuts("AEMR", 2, weight, limit=500) is None
    assert choose_cuts("AEMR", 1, work_weight("AEMR", 1, WORK)) == ()
    assert choose_cuts("AEMR", 4, work_weight("AEMR", 4, WORK)) == (1, 2, 3)
