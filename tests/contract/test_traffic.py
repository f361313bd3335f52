"""What leaves a node, by groups."""

from __future__ import annotations

from nemo_megacpp.contract.traffic import traffic
from nemo_megacpp.formulas.collectives import Collective
from nemo_megacpp.layout import ParallelLayout


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
