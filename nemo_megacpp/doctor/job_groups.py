"""The communicators of a job as the process groups of a layout, and the nodes that each spans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from nemo_megacpp.doctor.nccl_log import Communicator, Process
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.layout.placement import EMBEDDING, GROUPS, group_of, group_size

_STAGE_PAIR = "pp pair"
OTHER = "other"
_INSIDE_A_NODE = ("tp", "etp")


class GroupKind(NamedTuple):
    """The communicators of one kind of process group.

    Attributes:
        name: kinds of :data:`GROUPS` that have these ranks, ``tp, tp-cp`` for example; ``pp pair``
            for two stages that send to each other; ``other`` for ranks that no group joins.
        size: ranks of each; of the largest for ``other``.
        expected: groups of the kind in the layout; None where communicators come as needed.
        found: communicators in the log, those of the same ranks counted once.
        nodes: nodes that the widest spans.
        widest: the ranks of the widest.
        transports: over what their ranks reach one another.
    """

    name: str
    size: int
    expected: int | None
    found: int
    nodes: int
    widest: tuple[int, ...]
    transports: tuple[str, ...]

    @property
    def leaves_its_node(self) -> bool:
        """Return whether a group that exchanges activations in every layer spans several nodes."""
        return self.nodes > 1 and any(n in _INSIDE_A_NODE for n in self.name.split(", "))


def match_groups(communicators: Sequence[Communicator], layout: ParallelLayout) -> list[GroupKind]:
    """Name every communicator by the layout's groups, in the order of :data:`GROUPS`.

    Raises:
        UserError: the log has no communicator of all ranks, or none of any TP group.
    """
    rank_of = _ranks(communicators, layout.world)
    host_of = {rank: process.host for process, rank in rank_of.items()}
    kinds = _kinds(layout)
    names = {ranks: name for name, groups in kinds.items() for ranks in groups}
    found: dict[str, dict[tuple[int, ...], set[str]]] = defaultdict(dict)
    for communicator in communicators:
        ranks = tuple(rank_of[member] for member in communicator.members)
        name = names.get(ranks) or _unnamed(ranks, layout)
        found[name].setdefault(ranks, set()).update(communicator.transports)
    if layout.tp > 1 and not any("tp" in name.split(", ") for name in found):
        raise UserError(
            f"No communicator of the log joins a TP group of {layout.describe()}, "
            f"such as ranks {', '.join(map(str, group_of(layout, 0, 'tp')))}: the log is of "
            f"another layout. Give the run's own with --layout."
        )
    shown = []
    for name in (*kinds, _STAGE_PAIR, OTHER):
        if not (groups := found.get(name)):
            continue
        spans = {ranks: len({host_of[rank] for rank in ranks}) for ranks in groups}
        widest = max(spans, key=lambda ranks: spans[ranks])
        size = max(map(len, groups))
        expected = len(kinds[name]) if name in kinds else None
        via = tuple(sorted(set().union(*groups.values())))
        shown.append(GroupKind(name, size, expected, len(groups), spans[widest], widest, via))
    return shown


def _ranks(communicators: Sequence[Communicator], world: int) -> dict[Process, int]:
    """Return the rank in the job of each process, by the communicators of all ranks."""
    whole = {c.members for c in communicators if len(c.members) == world}
    if len(whole) != 1:
        sizes = sorted({len(c.members) for c in communicators}, reverse=True)
        raise UserError(
            f"The layout has {world:,} ranks, and the log "
            + (
                f"has {len(whole)} orders of them"
                if whole
                else f"no communicator of so many; the largest has {sizes[0]:,}. Give the run's "
                f"layout and --world-size"
            )
            + "."
        )
    ranks = {process: rank for rank, process in enumerate(whole.pop())}
    for communicator in communicators:
        if strange := set(communicator.members) - set(ranks):
            process = min(strange)
            raise UserError(
                f"Process {process.pid} on {process.host} is in communicator {communicator.name}, "
                f"and not in the one of all ranks: the log holds several jobs."
            )
    return ranks


def _kinds(layout: ParallelLayout) -> dict[str, list[tuple[int, ...]]]:
    """Return the groups by kind; kinds of the same groups are one, those of one rank absent."""
    merged: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for name in (*GROUPS, EMBEDDING):
        if group_size(layout, name) > 1:
            groups = dict.fromkeys(group_of(layout, rank, name) for rank in range(layout.world))
            merged.setdefault(tuple(groups), []).append(name)
    return {", ".join(names): list(groups) for groups, names in merged.items()}


def _unnamed(ranks: tuple[int, ...], layout: ParallelLayout) -> str:
    """Two ranks of a pipeline have a communicator of their own where sends are not batched."""
    one_pipeline = set(ranks) <= set(group_of(layout, ranks[0], "pp"))
    return _STAGE_PAIR if len(ranks) == 2 and one_pipeline else OTHER
