"""Legal layouts near one that is not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from nemo_megacpp.layout.legality import is_legal
from nemo_megacpp.layout.parallel import ParallelLayout
from nemo_megacpp.layout.shape import ModelShape

_POWERS = (1, 2, 4, 8, 16)


def nearest_legal(
    layout: ParallelLayout,
    shape: ModelShape,
    *,
    gpus_per_node: int | None = None,
    most: int = 3,
) -> list[ParallelLayout]:
    """Return the legal layouts of the same world that change the degrees least, nearest first.

    Near is a small sum of the logarithms by which degrees move. Degrees tried are the ones asked
    for, powers of two, and the divisors of depth and experts; SP is on wherever TP is above 1.

    Args:
        layout: the layout asked for; its degrees must be positive.
        shape: the model's sizes.
        gpus_per_node: as in :func:`nemo_megacpp.layout.check_layout`.
        most: how many to return.
    """
    candidates = sorted(_candidates(layout, shape), key=lambda other: _distance(layout, other))
    found: list[ParallelLayout] = []
    for candidate in candidates:
        if is_legal(candidate, shape, gpus_per_node=gpus_per_node):
            found.append(candidate)
            if len(found) == most:
                break
    return found


def _candidates(layout: ParallelLayout, shape: ModelShape) -> Iterator[ParallelLayout]:
    depth = len(shape.pattern)
    experts = shape.num_moe_experts or 1
    tps = sorted({*_POWERS, layout.tp})
    cps = sorted({*_POWERS, layout.cp})
    pps = sorted({*_divisors(depth), layout.pp, len(shape.pattern.cuts) + 1})
    eps = sorted({*_divisors(experts), layout.ep})
    for tp, cp, pp, ep in product(tps, cps, pps, eps):
        for etp in sorted({1, tp, layout.etp}):
            for vpp in {layout.vpp, None}:
                yield replace(
                    layout,
                    tensor_model_parallel_size=tp,
                    sequence_parallel=tp > 1,
                    context_parallel_size=cp,
                    pipeline_model_parallel_size=pp,
                    virtual_pipeline_model_parallel_size=vpp,
                    expert_model_parallel_size=ep,
                    expert_tensor_parallel_size=etp,
                )


def _distance(asked: ParallelLayout, other: ParallelLayout) -> float:
    moved = 0.0
    for name in ("tp", "cp", "pp", "ep", "etp"):
        moved += abs(math.log2(getattr(other, name) / getattr(asked, name)))
    return moved + (asked.vpp != other.vpp) + 0.5 * (asked.sp != other.sp)


def _divisors(value: int) -> list[int]:
    return [divisor for divisor in range(1, value + 1) if value % divisor == 0]
