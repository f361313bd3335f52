"""How long a collective takes: its bytes over the slowest link that its group crosses, and the
latency of its steps.

A ring over several nodes leaves each node once for each GPU that the group has there, over as many
network ports. An all-to-all sends each node its share. Other groups use other GPUs, and so other
ports. The steps of a small collective are those of a tree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, log2

from nemo_megacpp.contract.machine import Machine
from nemo_megacpp.formulas.collectives import Collective
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.layout.placement import group_of


@dataclass(frozen=True)
class _Spread:
    """A group over nodes: its ranks, the fewest on one of its nodes, the nodes, and the share of
    pairs of its ranks that are on two nodes."""

    size: int
    fewest: int
    nodes: int
    apart: float


class CollectiveTime:
    """The time of collectives of one rank of a layout.

    Args:
        machine: with its own number of GPUs a node.
        layout: the degrees, with the world.
        rank: global, whose groups are looked up.
    """

    def __init__(self, machine: Machine, layout: ParallelLayout, rank: int) -> None:
        self._machine, self._layout, self._rank = machine, layout, rank
        self._spreads: dict[str, _Spread] = {}

    def seconds(self, made: Collective) -> float:
        """Return the seconds of all calls of ``made``; a receive counts where it is sent."""
        spread = self._spread(made.group)
        if made.kind == "receive" or spread.size == 1:
            return 0.0
        machine = self._machine
        near, far = machine.in_node.bandwidth, machine.between_nodes.bandwidth
        link = machine.between_nodes if spread.nodes > 1 else machine.in_node
        sent = made.wire_bytes(spread.size) / made.count
        if made.kind == "send":
            moving, steps = sent / link.bandwidth, 1
        elif made.kind == "all_to_all":
            moving, steps = max(sent * (1 - spread.apart) / near, sent * spread.apart / far), 1
        else:
            moving = sent / near if spread.fewest > 1 else 0.0
            if spread.nodes > 1:
                moving = max(moving, sent / (spread.fewest * far))
            steps = ceil(log2(spread.size)) * (2 if made.kind == "all_reduce" else 1)
        each = moving / machine.efficiency.link + steps * link.latency + machine.kernel_seconds
        return made.count * each

    def total(self, collectives: Iterable[Collective]) -> float:
        """Return the seconds of several, one after another."""
        return sum(map(self.seconds, collectives))

    def _spread(self, group: str) -> _Spread:
        if group not in self._spreads:
            gpus = self._machine.gpus_per_node
            nodes = Counter(rank // gpus for rank in group_of(self._layout, self._rank, group))
            size, counts = nodes.total(), nodes.values()
            pairs = size * (size - 1)
            together = sum(count * (count - 1) for count in counts)
            apart = (pairs - together) / pairs if pairs else 0.0
            self._spreads[group] = _Spread(size, min(counts), len(nodes), apart)
        return self._spreads[group]
