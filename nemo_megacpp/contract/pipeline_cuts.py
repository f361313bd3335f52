"""Where to cut the pipeline: the heaviest chunk is made as light as possible.

The rules, in order:

1. No cut inside a run of adjacent E blocks or of adjacent R blocks (a *seam*): a stage boundary
   there would slice through a region of routing, or of state. Only where a pattern has too few
   other places are seams cut, and then as few as can be.
2. The heaviest chunk is as light as possible.
3. Of what is left, the choice in which the chunk with most R blocks has fewest: their recurrences
   wait step by step, which no count of operations shows.
4. Of what is left, the choice in which fewest chunks begin with an E or an F: it stays with the
   mixer before it, as the MLP does in a transformer layer.
5. Of what is left, the most even one (least sum of squared weights), and then the latest cuts.

All of it is exact, by dynamic programming over layers and chunks. With virtual stages the chunk is
balanced, because in the interleaved schedule every turn waits for the heaviest chunk.

A chunk's weight is its work (:mod:`nemo_megacpp.contract.work`): floating-point operations of the
forward pass, for one token, in the whole model. The backward pass doubles all of them alike, and
TP, CP and EP divide them by the same degrees in every stage, so only their proportions matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import accumulate

from nemo_megacpp.pattern import Family

Weight = Callable[[int, int, int], int]
"""``(chunk, first layer, end layer)`` to the weight of that chunk; grows with the layers in it."""

_SEAMS = (Family.EXPERT.value, Family.RECURRENT.value)
_AFTER_A_MIXER = (Family.EXPERT.value, Family.FEED_FORWARD.value)


def choose_cuts(
    letters: str, chunks: int, weight: Weight, limit: float = math.inf
) -> tuple[int, ...] | None:
    """Return the layers before which chunks 1, 2, … begin.

    Args:
        letters: the family of each layer.
        chunks: how many chunks, none of which may be empty.
        weight: what to balance.
        limit: what no chunk may weigh more than.

    Returns:
        ``chunks - 1`` cuts; None if there are fewer layers than chunks, or nothing keeps the limit.
    """
    if not 1 <= chunks <= len(letters):
        return None
    heaviest = _plan(letters, chunks, lambda *at: _within(weight(*at), limit), max)
    if heaviest is None:
        return None
    bound, _ = heaviest
    recurrent = [0, *accumulate(letter == Family.RECURRENT.value for letter in letters)]

    def spread(chunk: int, first: int, end: int) -> int | None:
        fits = _within(weight(chunk, first, end), bound)
        return None if fits is None else recurrent[end] - recurrent[first]

    spread_out = _plan(letters, chunks, spread, max)
    assert spread_out is not None
    most = spread_out[0]

    above_all_squares = chunks * bound**2 + 1

    def parted_or_uneven(chunk: int, first: int, end: int) -> int | None:
        count = spread(chunk, first, end)
        if count is None or count > most:
            return None
        parts = first > 0 and letters[first] in _AFTER_A_MIXER
        return parts * above_all_squares + weight(chunk, first, end) ** 2

    even = _plan(letters, chunks, parted_or_uneven, int.__add__)
    assert even is not None
    return even[1]


def is_seam(letters: str, cut: int) -> bool:
    """Whether a cut before layer ``cut`` slices a run of E or of R blocks."""
    return letters[cut - 1] == letters[cut] and letters[cut] in _SEAMS


def seam_at(letters: str, cut: int) -> bool:
    """Whether a cut before layer ``cut`` has an E or R block on both sides: what routes or recurs
    before it must end before the message leaves."""
    return letters[cut - 1] in _SEAMS and letters[cut] in _SEAMS


def work_weight(letters: str, chunks: int, work: Mapping[str, int]) -> Weight:
    """Return the weight of a chunk in operations per token, ends included."""
    before = [0, *accumulate(work[letter] for letter in letters)]

    def weight(chunk: int, first: int, end: int) -> int:
        ends = work["embedding"] * (chunk == 0) + work["head"] * (chunk == chunks - 1)
        return before[end] - before[first] + ends

    return weight


def _within(weight: int, limit: float) -> int | None:
    return weight if weight <= limit else None


def _plan(
    letters: str,
    chunks: int,
    price: Callable[[int, int, int], int | None],
    join: Callable[[int, int], int],
) -> tuple[int, tuple[int, ...]] | None:
    """Return the least joined price of all chunks, and its cuts.

    ``price`` is None for a forbidden chunk; longer chunks that end there are then forbidden too.
    """
    depth = len(letters)
    seam = [cut > 0 and is_seam(letters, cut) for cut in range(depth)]
    free = depth - 1 - sum(seam)
    slices = max(0, chunks - 1 - free)
    # best[end, seams cut so far]: price so far, and where the last chunk begins.
    best: dict[tuple[int, int], tuple[int, int]] = {(0, 0): (0, 0)}
    history = [best]
    for chunk in range(chunks):
        found: dict[tuple[int, int], tuple[int, int]] = {}
        last_end = depth - (chunks - 1 - chunk)
        ends = range(chunk + 1, last_end + 1) if chunk < chunks - 1 else range(depth, depth + 1)
        for end in ends:
            for first in range(end - 1, chunk - 1, -1):
                cost = price(chunk, first, end)
                if cost is None:
                    break
                for used in range(slices + 1):
                    so_far = best.get((first, used - seam[first]))
                    if so_far is None:
                        continue
                    total = join(so_far[0], cost)
                    if (end, used) not in found or total < found[end, used][0]:
                        found[end, used] = (total, first)
        best = found
        history.append(found)
    ways = [(total[0], used) for (_, used), total in best.items()]
    if not ways:
        return None
    least, used = min(ways)
    cuts, end = [], depth
    for chunk in range(chunks, 0, -1):
        _, first = history[chunk][end, used]
        if first:
            cuts.append(first)
            used -= seam[first]
        end = first
    return least, tuple(reversed(cuts))
