"""Groups by axes, against the groups of the layout, and what leaves a node."""

from __future__ import annotations

import pytest

from nemo_megacpp.contract.traffic import traffic
from nemo_megacpp.formulas.collectives import Collective
from nemo_megacpp.formulas.placement import GROUPS, group_facts, group_of, group_size
from nemo_megacpp.layout import ParallelLayout


@pytest.mark.parametrize("text", ["tp=2,cp=2,pp=2,world=16", "tp=2,ep=4,etp=1,pp=3,world=24"])
def test_groups_of_one_axis_are_the_layouts(text: str) -> None:
    layout = ParallelLayout.parse(text)
    for axis in ("tp", "cp", "dp", "pp", "etp", "ep", "edp"):
        groups = {tuple(ranks) for ranks in layout.groups(axis)}
        assert {group_of(layout, rank, axis) for rank in range(layout.world)} == groups


def test_groups_partition_the_world() -> None:
    layout = ParallelLayout.parse("tp=2,cp=2,ep=2,etp=1,pp=2,world=16")
    for group in GROUPS:
        members = {group_of(layout, rank, group) for rank in range(16)}
        assert sorted(rank for ranks in members for rank in ranks) == list(range(16))
        facts = group_facts(layout, group, gpus_per_node=4)
        assert (facts.groups, facts.size) == (len(members), group_size(layout, group))
        assert facts.nodes == max(len({rank // 4 for rank in ranks}) for ranks in members)


def test_what_leaves_a_node() -> None:
    """Four ranks on two nodes: half of a ring's steps, and two of three partners, are elsewhere."""
    layout = ParallelLayout.parse("cp=4")
    made = [
        Collective("all_reduce", "cp", 800, "forward", "sum", "x", count=2),
        Collective("all_to_all", "cp", 800, "forward", "layout transition", "x"),
    ]
    ring = traffic(layout, made[:1], 0, gpus_per_node=2)[0]
    assert (ring.calls, ring.tensor_bytes, ring.sent_bytes) == (2, 1600, 2400)
    assert ring.between_nodes == 1200
    exchange = traffic(layout, made[1:], 0, gpus_per_node=2)[0]
    assert (exchange.sent_bytes, exchange.between_nodes) == (600, 400)
    assert traffic(layout, made, 0, gpus_per_node=4)[0].between_nodes == 0
