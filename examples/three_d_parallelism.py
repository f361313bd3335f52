"""3D parallelism: where each rank sits on TP, DP and PP, and on the axes of the experts.

TP is fastest in the rank order, so its groups are neighbours in one node; PP is slowest and crosses
nodes. Expert layers count the same ranks by ETP, EP and expert DP. Needs no GPU::

    python examples/three_d_parallelism.py
"""

from __future__ import annotations

from nemo_megacpp.layout import ParallelLayout

LAYOUT = "tp=2,pp=2,ep=2,etp=1,world=8"


def main() -> None:
    """Print the coordinates of every rank, and the ranks of each TP and PP group."""
    layout = ParallelLayout.parse(LAYOUT)
    print(layout.describe())
    ranks = {rank: layout.rank_coordinates(rank) for rank in range(layout.world)}
    for rank, at in ranks.items():
        dense = f"tp={at.tp} dp={at.dp} pp={at.pp}"
        print(f"  rank {rank}: dense layers {dense}, experts ep={at.ep} edp={at.edp} pp={at.pp}")
    for axis in ("tp", "pp"):
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, at in ranks.items():
            others = tuple(getattr(at, name) for name in ("tp", "dp", "pp") if name != axis)
            groups.setdefault(others, []).append(rank)
        print(f"  {axis} groups: {'  '.join(map(str, groups.values()))}")


if __name__ == "__main__":
    main()
