"""A layout's axes one by one and two by two, and which of them made a model differ."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.pattern import Family


def axes_alone(layout: ParallelLayout) -> list[tuple[str, ParallelLayout]]:
    """Return each axis that ``layout`` uses, in the smallest layout that moves it."""
    alone = [(axis, ParallelLayout(**degrees)) for axis, degrees in _degrees(layout)]
    return [(axis, place) for axis, place in alone if place.world <= layout.world]


def axes_in_pairs(layout: ParallelLayout) -> list[tuple[str, ParallelLayout]]:
    """Return two axes at a time, where that is more than one of them and less than ``layout``."""
    known = {spelled_out(place) for _, place in axes_alone(layout)} | {spelled_out(layout)}
    pairs = []
    for (first, a), (second, b) in combinations(_degrees(layout), 2):
        place = ParallelLayout(**{**a, **b})
        if place.world <= layout.world and spelled_out(place) not in known:
            known.add(spelled_out(place))
            pairs.append((f"{first} with {second}", place))
    return pairs


def spelled_out(layout: ParallelLayout) -> ParallelLayout:
    """Return ``layout`` with its defaults filled in, so that equal ones compare equal."""
    return dataclasses.replace(
        layout, expert_tensor_parallel_size=layout.etp, world_size=layout.world
    )


def axes_of(letter: str, layout: ParallelLayout) -> ParallelLayout:
    """Return ``layout`` for one family: the expert axes are E's alone, and data-parallel ranks
    take their place elsewhere."""
    if letter == Family.EXPERT.value:
        return layout
    return dataclasses.replace(
        layout,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=None,
        world_size=layout.world,
    )


def _degrees(layout: ParallelLayout) -> list[tuple[str, dict[str, Any]]]:
    tp: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sp,
    }
    pp = {"pipeline_model_parallel_size": layout.pp}
    found: list[tuple[str, dict[str, Any]]] = []
    if layout.tp > 1:
        found.append(("TP", {**tp, "expert_tensor_parallel_size": layout.tp}))
    if layout.etp != layout.tp:
        found.append(("ETP", {**tp, "expert_tensor_parallel_size": layout.etp}))
    if layout.cp > 1:
        found.append(("CP", {"context_parallel_size": layout.cp}))
    if layout.ep > 1:
        found.append(("EP", {"expert_model_parallel_size": layout.ep}))
    if layout.pp > 1:
        found.append(("PP", pp))
    if layout.vpp is not None:
        found.append(("VPP", {**pp, "virtual_pipeline_model_parallel_size": layout.vpp}))
    if layout.data_parallel_size > 1:
        found.append(("DP", {"world_size": layout.data_parallel_size}))
    return found
