"""All layouts of a world, and why most of them are illegal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

from nemo_megacpp.layout import (
    LayoutViolation,
    ModelShape,
    ParallelLayout,
    check_layout,
    is_legal,
)
from nemo_megacpp.layout.rules import divisors_of
from nemo_megacpp.pattern import Family, HybridPattern


@dataclass(frozen=True)
class Rejection:
    """Layouts that are illegal for one reason, the first that was found.

    Attributes:
        setting: what they have in common, as ``name=value``.
        axis, rule, message: of the violation; see :class:`nemo_megacpp.layout.LayoutViolation`.
        layouts: how many they are.
    """

    setting: str
    axis: str
    rule: str
    message: str
    layouts: int


@dataclass(frozen=True)
class Candidates:
    """The layouts of a world.

    Attributes:
        total: how many were checked.
        legal: those that are legal, in the order of their degrees.
        rejected: why the others are not; ``total - len(legal)`` layouts in all.
    """

    total: int
    legal: tuple[ParallelLayout, ...]
    rejected: tuple[Rejection, ...]


def all_layouts(
    shape: ModelShape,
    world: int,
    gpus_per_node: int,
    cut: Callable[[int], HybridPattern],
    fixed: Mapping[str, Any] = MappingProxyType({}),
) -> Candidates:
    """Return every layout of ``world`` ranks.

    TP, CP, PP, EP and ETP run over the divisors of the world for which TP x CP x PP and
    ETP x EP x PP divide it; SP is on or off where TP > 1; VPP is off, 2 or a divisor of the world
    where PP > 1. A model without experts has EP = ETP = 1.

    Args:
        shape: a dataclass with the fields of `ModelShape`.
        world: ranks.
        gpus_per_node: GPUs of one NVLink domain.
        cut: the pattern with cuts for a number of chunks, from 1 to the depth.
        fixed: degrees, by short name, that keep their value.
    """
    uncut = replace(shape.pattern, cuts=())
    part = replace(shape, pattern=uncut, micro_batch_size=None, global_batch_size=None)

    @cache
    def violation(chunks: int | None = None, **degrees: Any) -> LayoutViolation | None:
        """Return the first violation of a layout that has ``degrees``, and 1 everywhere else.

        With ``chunks``, ``degrees`` are all the dense ones, and the batch is checked too. No rule
        reads dense and expert degrees together (counting makes sure that both divide the world),
        so that few distinct questions decide about all layouts.
        """
        layout = ParallelLayout.from_mapping({"etp": 1, "world": world, **degrees})
        model = part if chunks is None else replace(shape, pattern=cut(chunks))
        if is_legal(layout, model, gpus_per_node=gpus_per_node):
            return None
        return check_layout(layout, model, gpus_per_node=gpus_per_node)[0]

    rejected: dict[tuple[str, str], Rejection] = {}

    def rejects(setting: str, why: LayoutViolation | None, layouts: int) -> bool:
        """Count ``layouts`` under ``why``; say whether there is a reason at all."""
        if why is not None:
            old = rejected.get((why.rule, setting))
            count = layouts + (old.layouts if old else 0)
            rejection = Rejection(setting, why.axis, why.rule, why.message, count)
            rejected[why.rule, setting] = rejection
        return why is not None

    has_experts = Family.EXPERT in shape.pattern.all_families
    depth, total, legal = len(shape.pattern), 0, []
    for tp, cp, pp in _splits(world, fixed):
        choices = [None, *sorted({2, *divisors_of(world)[1:]})] if pp > 1 else [None]
        virtual = [fixed["vpp"]] if fixed.get("vpp") and pp > 1 else _only(fixed, "vpp", choices)
        banks = _banks(world // pp, fixed) if has_experts else [(1, 1)]
        for sp in _only(fixed, "sp", [True, False] if tp > 1 else [False]):
            total += len(virtual) * len(banks)
            dense = {"tp": tp, "sp": sp, "cp": cp}
            checks = {
                f"tp={tp}": {"tp": tp, "sp": tp > 1},
                f"tp={tp},sp=false": {"tp": tp, "sp": sp},
                f"tp={tp},cp={cp}": dense,
            }
            if any(
                rejects(setting, violation(**degrees), len(virtual) * len(banks))
                for setting, degrees in checks.items()
            ):
                continue
            for vpp in virtual:
                pipeline, chunks = {**dense, "pp": pp, "vpp": vpp}, pp * (vpp or 1)
                setting = f"pp={pp}" + (f",vpp={vpp}" if vpp else "")
                why: LayoutViolation | None
                if chunks > depth:
                    axis = "VPP" if vpp else "PP"
                    text = f"{chunks} pipeline chunks (PP x VPP) need a layer each; the model has "
                    why = LayoutViolation(axis, "too-many-chunks", f"{text}{depth}.")
                else:
                    setting = f"tp*cp={tp * cp},{setting}"
                    why = violation(chunks, **pipeline)
                if rejects(setting, why, len(banks)):
                    continue
                for ep, etp in banks:
                    if not (
                        rejects(f"ep={ep}", violation(ep=ep), 1)
                        or rejects(f"etp={etp}", violation(etp=etp), 1)
                    ):
                        degrees = {**pipeline, "ep": ep, "etp": etp, "world": world}
                        legal.append(ParallelLayout.from_mapping(degrees))
    return Candidates(total, tuple(legal), tuple(rejected.values()))


def _splits(world: int, fixed: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    for tp in _only(fixed, "tp", divisors_of(world)):
        for cp in _only(fixed, "cp", divisors_of(world // tp)):
            for pp in _only(fixed, "pp", divisors_of(world // tp // cp)):
                yield tp, cp, pp


def _banks(ranks: int, fixed: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [
        (ep, etp)
        for ep in _only(fixed, "ep", divisors_of(ranks))
        for etp in _only(fixed, "etp", divisors_of(ranks // ep))
    ]


def _only(fixed: Mapping[str, Any], name: str, values: list[Any]) -> list[Any]:
    return [value for value in values if name not in fixed or value == fixed[name]]
