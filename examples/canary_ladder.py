"""A canary ladder: bring a small hybrid up to a split sequence, one change at a time.

Each rung is one change to the one below and is held to one rank: ``nemo-megacpp ladder`` as a
program. Two ranks, on GPUs or on the CPU; a minute::

    python examples/canary_ladder.py
"""

from __future__ import annotations

import sys

from nemo_megacpp.commands.ladder import climb_recipe
from nemo_megacpp.recipes.recipe import resolve


def main() -> int:
    """Print the rungs; return 1 if one does not give the numbers of one rank."""
    recipe = resolve("nam56r_tiny", ["pattern=AM", "depth=2"])
    return climb_recipe(recipe, ranks=2, start=None, doublings=1, as_json=False)


if __name__ == "__main__":
    sys.exit(main())
