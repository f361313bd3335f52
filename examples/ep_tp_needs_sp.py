"""EP and TP together need SP: the rule, its reason, and the nearest legal layout.

Expert dispatch leaves the dense TP layout, and the way back restores activations that are sharded
along the sequence. Megatron's MoELayer refuses to train at TP > 1 without SP. Needs no GPU::

    python examples/ep_tp_needs_sp.py
"""

from __future__ import annotations

from nemo_megacpp.layout import ParallelLayout, check_layout, nearest_legal
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.views import shape_of

LAYOUTS = ("tp=2,ep=2,etp=1,sp=false", "tp=2,ep=2,etp=1,sp=true", "ep=2,sp=false")


def main() -> None:
    """Print which layouts of NAM56R are legal, and why one is not."""
    shape = shape_of(resolve("nam56r"))
    for text in LAYOUTS:
        layout = ParallelLayout.parse(text)
        violations = check_layout(layout, shape)
        print(f"{text}: {'illegal' if violations else 'legal'}")
        for violation in violations:
            nearest = nearest_legal(layout, shape, most=1)[0]
            print(f"  {violation}")
            print(f"  nearest legal layout: {nearest.short()}")


if __name__ == "__main__":
    main()
