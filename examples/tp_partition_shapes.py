"""TP partition shapes: what each rank holds of NAM56R's attention, and what stays whole.

At TP=8 a rank has 7 of the 56 query heads (448 of 3584 columns) and 1 of the 8 KV heads (64), so
the 7:1 ratio of grouped queries survives on each rank. Needs no GPU::

    python examples/tp_partition_shapes.py
"""

from __future__ import annotations

from nemo_megacpp.contract.layout_plan import make_plan
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.views import job_of


def main() -> None:
    """Print heads and shapes of a rank, by TP degree."""
    for tp in (1, 2, 4, 8):
        recipe = resolve("nam56r", ["pattern=A", "depth=1"], layout=f"tp={tp}")
        heads = recipe.model["num_attention_heads"] // tp
        groups = recipe.model["num_query_groups"] // tp
        width = recipe.model["kv_channels"]
        print(
            f"TP={tp}, query heads of a rank: {heads} ({heads * width} columns), "
            f"KV heads: {groups} ({groups * width} columns), {heads // groups}:1"
        )
        for owned in make_plan(job_of(recipe)).owned:
            if owned.family == "A":
                split = ", ".join(owned.split) or "whole"
                print(f"  {owned.name:<43} {_shape(owned.local_shape):>11}  {split}")


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


if __name__ == "__main__":
    main()
