"""Decide what each gather and all-to-all was for, from what all ranks recorded.

A gather is *needed* if an operator brought several ranks' shares together, or if another rank's
share met what only this rank holds (its rows of a weight, its heads, its experts) and the result
left the rank. It is *undone* if all that came of it was this rank's own share again, or values that
every rank of the group had computed alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.layout.placement import GROUPS, group_of
from nemo_megacpp.proof.gather_recorder import RecordedGather
from nemo_megacpp.proof.share_tracking import Event

Verdict = Literal["needed", "undone"]

_LABELS = {
    "mm": "matrix product",
    "bmm": "matrix product",
    "addmm": "matrix product",
    "baddbmm": "matrix product",
    "addbmm": "matrix product",
    "matmul": "matrix product",
    "linear": "matrix product",
    "convolution": "convolution",
    "mul": "element-wise product",
    "add": "element-wise sum",
    "cumsum": "scan",
    "embedding_dense_backward": "sum over tokens",
    "sum": "sum",
    "mean": "sum",
    "index": "indexing",
    "index_put": "indexing",
    "gather": "indexing",
    "index_add": "sum",
    "scatter_add": "sum",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "all_reduce": "all-reduce",
    "send": "message",
}
_EXPERT_GROUPS = ("ep", "etp", "etp-ep")
_OF_ONE_RANK = "with its own part"
_TOGETHER = "over ranks' shares"


@dataclass(frozen=True)
class GatherVerdict:
    """What a gather was for.

    Attributes:
        verdict: ``needed`` or ``undone``.
        operator: the operator that needs it, or that undoes it, and of which module.
        why: the same as a phrase.
    """

    verdict: Verdict
    operator: str
    why: str


@dataclass(frozen=True)
class JudgedGather:
    """A gather of one rank, with the name of its group and the verdict of the whole group."""

    gather: RecordedGather
    group: str
    judged: GatherVerdict


def judge(
    records: Sequence[Sequence[RecordedGather]], layout: ParallelLayout
) -> list[JudgedGather]:
    """Return the gathers of the first rank of each pipeline stage, in the order of the depth.

    Args:
        records: by rank.
        layout: of the ranks.
    """
    calls: dict[tuple[tuple[int, ...], int], dict[int, RecordedGather]] = defaultdict(dict)
    for rank, gathers in enumerate(records):
        for gather in gathers:
            calls[gather.ranks, gather.ordinal][rank] = gather
    found = []
    for rank in sorted(group_of(layout, 0, "pp")):
        for gather in records[rank]:
            group = calls[gather.ranks, gather.ordinal]
            events = [group[member].events for member in gather.ranks if member in group]
            verdict = verdict_of(events, gather.is_float)
            found.append(JudgedGather(gather, _group_name(layout, rank, gather), verdict))
    return found


def verdict_of(ranks: Sequence[Sequence[Event]], is_float: bool = True) -> GatherVerdict:
    """Return the verdict on one gather.

    Args:
        ranks: its events, by rank of the group.
        is_float: whether it holds floating-point numbers.
    """
    differing = _joins_that_differ(ranks)
    for events in ranks:
        joins = [event for event in events if event in differing]
        for event in events:
            if event.kind in ("mix", "host"):
                return _needed(joins[0] if joins else event)
    for events in ranks:
        for at, event in enumerate(events):
            if event.kind in ("sent", "reduced"):
                before = [join for join in events[:at] if join in differing]
                if before:
                    return _needed(before[0])
    kinds = [{event.kind: event for event in events} for events in ranks if events]
    for found in kinds:
        if "sent" in found:
            return _undone(found["sent"])
    cut_everywhere = all("own" in found for found in kinds)
    if kinds and cut_everywhere and not (differing and any("others" in found for found in kinds)):
        return _undone(kinds[0]["own"])
    if differing:
        return _needed(differing[-1])
    passed = next((found["passed"] for found in kinds if "passed" in found), None)
    if passed is not None:
        where = f"{_label(passed)} over another group"
        return GatherVerdict("needed", _operator(passed), where)
    if is_float:
        return GatherVerdict("undone", "", "no operator reads another rank's share")
    return GatherVerdict("needed", "host", "read by the host")


def _joins_that_differ(ranks: Sequence[Sequence[Event]]) -> list[Event]:
    """Return the joins with tensors that are not the same on all ranks of the group."""
    joins = [[event for event in events if event.kind == "join"] for events in ranks]
    found = []
    for mine in joins:
        for number, event in enumerate(mine):
            others = [other[number] if number < len(other) else None for other in joins]
            if any(other is None or other.digest != event.digest for other in others):
                found.append(event)
    return found


def _needed(event: Event) -> GatherVerdict:
    if event.kind == "host":
        return GatherVerdict("needed", f"host in {event.place}", "read by the host")
    what = _OF_ONE_RANK if event.kind == "join" else _TOGETHER
    return GatherVerdict("needed", _operator(event), f"{_label(event)} {what}")


def _undone(event: Event) -> GatherVerdict:
    inside = f" in {event.function}" if event.function and _is_named(event) else ""
    if event.kind == "own":
        why = f"cut back to this rank's share before {_label(event)}{inside}"
    else:
        why = f"{_label(event)} sends the shares back as they are on every rank"
    return GatherVerdict("undone", _operator(event), why)


def _operator(event: Event) -> str:
    return f"{event.op} in {event.place}" if event.place else event.op


def _is_named(event: Event) -> bool:
    return event.op.strip("_") in _LABELS


def _label(event: Event) -> str:
    """Return an operator as people call it; one without a name of its own by its function too."""
    name = event.op.strip("_")
    if "attention" in name:
        return "attention"
    return _LABELS.get(name) or (f"{event.function} ({name})" if event.function else name)


def _group_name(layout: ParallelLayout, rank: int, gather: RecordedGather) -> str:
    """Return the name of the group; of two with the same ranks, an expert group for experts."""
    names = [name for name in GROUPS if tuple(sorted(group_of(layout, rank, name))) == gather.ranks]
    experts = ".experts" in gather.place.path or gather.place.path.endswith(".mlp")
    of_experts = [name for name in names if name in _EXPERT_GROUPS]
    if experts and of_experts:
        return of_experts[0]
    return names[0] if names else "other"
