"""Totals of a step's traffic: by group, within nodes and between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nemo_megacpp.formulas.collectives import Collective
from nemo_megacpp.formulas.placement import group_of, group_size
from nemo_megacpp.layout import ParallelLayout


@dataclass(frozen=True)
class Traffic:
    """What a rank sends over one kind of group in one step.

    Attributes:
        group: a key of :data:`nemo_megacpp.formulas.placement.GROUPS`.
        calls: collectives, and messages sent.
        tensor_bytes: of the tensors that are passed to them.
        sent_bytes: that leave the rank, in a ring (or direct) algorithm.
        between_nodes: the part of ``sent_bytes`` that leaves the node, averaged over the group.
    """

    group: str
    calls: int
    tensor_bytes: int
    sent_bytes: int
    between_nodes: int


def traffic(
    layout: ParallelLayout, collectives: Iterable[Collective], rank: int, gpus_per_node: int
) -> list[Traffic]:
    """Return the totals of ``rank``'s collectives of a step, by group, largest first.

    A ring passes through its ranks in order; the part of its bytes that leaves a node is the part
    of its steps that do. An all-to-all sends as much to each rank.
    """
    totals: dict[str, list[float]] = {}
    crossing: dict[tuple[str, str], float] = {}
    for made in collectives:
        if made.kind == "receive":
            continue  # counted where it is sent
        exchange = "all_to_all" if made.kind == "all_to_all" else "ring"
        key = (made.group, exchange)
        if key not in crossing:
            crossing[key] = _crossing(layout, made.group, exchange, rank, gpus_per_node)
        sent = made.wire_bytes(_size(layout, made.group))
        entry = totals.setdefault(made.group, [0.0, 0.0, 0.0, 0.0])
        entry[0] += made.count
        entry[1] += made.bytes * made.count
        entry[2] += sent
        entry[3] += sent * crossing[key]
    found = [Traffic(group, *map(round, values)) for group, values in totals.items()]
    return sorted(found, key=lambda item: -item.sent_bytes)


def _size(layout: ParallelLayout, group: str) -> int:
    return 2 if group == "embedding" else group_size(layout, group)


def _crossing(
    layout: ParallelLayout, group: str, exchange: str, rank: int, gpus_per_node: int
) -> float:
    """Return the part of what a group's ranks send that goes to another node."""
    if group == "embedding":
        stages = group_of(layout, rank, "pp")
        ranks: tuple[int, ...] = (stages[0], stages[-1])
    else:
        ranks = group_of(layout, rank, group)
    nodes = [other // gpus_per_node for other in ranks]
    size = len(nodes)
    if size == 1:
        return 0.0
    if exchange == "ring":
        return sum(nodes[i] != nodes[(i + 1) % size] for i in range(size)) / size
    on_node = {node: nodes.count(node) for node in set(nodes)}
    return 1 - sum(count * (count - 1) for count in on_node.values()) / (size * (size - 1))
