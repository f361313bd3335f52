"""Process groups: which ranks are in them, and which of them leave a node."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from nemo_megacpp.layout.parallel import ParallelLayout

GROUPS: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "tp-cp": ("tp", "cp"),
    "dp-cp": ("cp", "dp"),
    "tp-cp-dp": ("tp", "cp", "dp"),
    "tp-pp": ("tp", "pp"),
    "ep": ("ep",),
    "etp": ("etp",),
    "edp": ("edp",),
    "etp-ep": ("etp", "ep"),
    "etp-ep-pp": ("etp", "ep", "pp"),
    "world": ("tp", "cp", "dp", "pp"),
}
"""Process groups by the axes that they span, fastest axis first. Dense layers count ranks along
tp, cp, dp, pp, and expert layers the same ranks along etp, ep, edp, pp."""

EMBEDDING = "embedding"
"""The group of the first and the last stage, which share a tied embedding."""

_DENSE = ("tp", "cp", "dp", "pp")
_EXPERT = ("etp", "ep", "edp", "pp")


@dataclass(frozen=True)
class GroupFacts:
    """One kind of process group.

    Attributes:
        name: a key of `GROUPS`.
        size: ranks of each group of this kind.
        groups: how many there are.
        nodes: nodes that the widest of them spans.
        example: the group of rank 0.
    """

    name: str
    size: int
    groups: int
    nodes: int
    example: tuple[int, ...]


def degrees_of(layout: ParallelLayout) -> dict[str, int]:
    """Return the degree of each axis."""
    return {
        "tp": layout.tp,
        "cp": layout.cp,
        "dp": layout.data_parallel_size,
        "pp": layout.pp,
        "etp": layout.etp,
        "ep": layout.ep,
        "edp": layout.expert_data_parallel_size,
    }


def group_size(layout: ParallelLayout, group: str) -> int:
    """Return the number of ranks in each group of this kind."""
    if group == EMBEDDING:
        return min(layout.pp, 2)
    degrees = degrees_of(layout)
    return math.prod(degrees[axis] for axis in GROUPS[group])


def group_of(layout: ParallelLayout, rank: int, group: str) -> tuple[int, ...]:
    """Return the global ranks of ``rank``'s group of this kind, in Megatron's order."""
    if group == EMBEDDING:
        stages = group_of(layout, rank, "pp")
        return (stages[0], stages[-1])
    strides = _strides(layout, group)
    place = layout.rank_coordinates(rank)
    base = rank - sum(getattr(place, axis) * stride for axis, stride, _ in strides)
    return tuple(base + offset for offset in _offsets(strides))


def group_facts(layout: ParallelLayout, group: str, gpus_per_node: int) -> GroupFacts:
    """Return size, number and spread over nodes of one kind of group."""
    offsets = _offsets(_strides(layout, group))
    example = group_of(layout, 0, group)
    if len(offsets) == 1:
        return GroupFacts(group, 1, layout.world, 1, example)
    member = [False] * layout.world
    nodes = groups = 0
    for rank in range(layout.world):  # the first rank not yet in a group is the base of its own
        if not member[rank]:
            groups += 1
            ranks = [rank + offset for offset in offsets]
            for other in ranks:
                member[other] = True
            nodes = max(nodes, len({other // gpus_per_node for other in ranks}))
    return GroupFacts(group, len(offsets), groups, nodes, example)


def _strides(layout: ParallelLayout, group: str) -> list[tuple[str, int, int]]:
    """Return ``(axis, ranks between neighbours, degree)`` for each axis of a group."""
    axes, degrees = GROUPS[group], degrees_of(layout)
    order = _EXPERT if set(axes) & {"etp", "ep", "edp"} else _DENSE
    stride, found = 1, {}
    for axis in order:
        found[axis] = (axis, stride, degrees[axis])
        stride *= degrees[axis]
    return [found[axis] for axis in axes]


def _offsets(strides: list[tuple[str, int, int]]) -> list[int]:
    steps = [[index * stride for index in range(size)] for _, stride, size in reversed(strides)]
    return [sum(step) for step in product(*steps)]
