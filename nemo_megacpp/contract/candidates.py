"""All layouts of a world, and why most of them are illegal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from nemo_megacpp.layout import ModelShape, ParallelLayout, Violation, check_layout, is_legal
from nemo_megacpp.pattern import Family, HybridPattern


@dataclass(frozen=True)
class Rejection:
    """Layouts that are illegal for one reason, the first that was found.

    Attributes:
        setting: what they have in common, as ``name=value``.
        axis, rule, message: of the violation; see :class:`nemo_megacpp.layout.Violation`.
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
        total: how many were looked at.
        legal: those that are legal, in the order of their degrees.
        rejected: why the others are not; ``total - len(legal)`` layouts in all.
    """

    total: int
    legal: tuple[ParallelLayout, ...]
    rejected: tuple[Rejection, ...]


class _Tally:
    """Counts rejected layouts by rule and setting."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Rejection] = {}

    def rejects(self, setting: str, why: Violation | None, layouts: int) -> bool:
        """Count ``layouts`` under ``why``; say whether there is a reason at all."""
        if why is None:
            return False
        old = self.found.get((why.rule, setting))
        count = layouts + (old.layouts if old else 0)
        self.found[why.rule, setting] = Rejection(setting, why.axis, why.rule, why.message, count)
        return True


class _Prober:
    """Asks the legality rules about parts of a layout, and remembers the answers.

    No rule looks at dense and at expert degrees together (that both divide the world is seen to
    while counting), so that few distinct questions decide about all layouts.
    """

    def __init__(self, shape: Any, world: int, gpus_per_node: int) -> None:
        self._shape, self._world, self._gpus = shape, world, gpus_per_node
        self._uncut = HybridPattern(shape.pattern.families)
        self._known: dict[tuple[Any, ...], Violation | None] = {}

    def __call__(self, pattern: HybridPattern | None = None, **degrees: Any) -> Violation | None:
        """Return the first violation of a layout that has ``degrees``, and 1 everywhere else.

        With a ``pattern``, ``degrees`` are all the dense ones, and the batch is looked at too.
        """
        key = (pattern is not None, *degrees.items())
        if key not in self._known:
            changes: dict[str, Any] = {"pattern": pattern or self._uncut}
            if pattern is None:
                changes |= {"micro_batch_size": None, "global_batch_size": None}
            shape = replace(self._shape, **changes)
            layout = ParallelLayout.from_mapping({"etp": 1, "world": self._world, **degrees})
            found = None
            if not is_legal(layout, shape, gpus_per_node=self._gpus):
                found = check_layout(layout, shape, gpus_per_node=self._gpus)[0]
            self._known[key] = found
        return self._known[key]


def all_layouts(
    shape: ModelShape,
    world: int,
    gpus_per_node: int,
    cut: Callable[[int], HybridPattern],
    fixed: Mapping[str, Any] = MappingProxyType({}),
) -> Candidates:
    """Return every layout of ``world`` ranks.

    TP, CP, PP, EP and ETP run over the divisors of the world for which TP x CP x PP and
    ETP x EP x PP divide it; SP is on or off where TP > 1; VPP is none, 2 or a divisor of the world
    where PP > 1. A model without experts has EP = ETP = 1.

    Args:
        shape: a dataclass with the fields of `ModelShape`.
        world: ranks.
        gpus_per_node: GPUs of one NVLink domain.
        cut: the pattern with cuts for a number of chunks, from 1 to the depth.
        fixed: degrees, by short name, that are not searched for.
    """
    prober, tally = _Prober(shape, world, gpus_per_node), _Tally()
    has_experts = Family.EXPERT in shape.pattern.families
    depth, total, legal = len(shape.pattern), 0, []
    for tp, cp, pp in _splits(world, fixed):
        choices = [None, *sorted({2, *divisors_of(world)[1:]})] if pp > 1 else [None]
        virtual = [fixed["vpp"]] if fixed.get("vpp") and pp > 1 else _kept(fixed, "vpp", choices)
        banks = _banks(world // pp, fixed) if has_experts else [(1, 1)]
        for sp in _kept(fixed, "sp", [True, False] if tp > 1 else [False]):
            total += len(virtual) * len(banks)
            dense = {"tp": tp, "sp": sp, "cp": cp}
            for setting, degrees in (
                (f"tp={tp}", {"tp": tp, "sp": tp > 1}),
                (f"tp={tp},sp=false", {"tp": tp, "sp": sp}),
                (f"tp={tp},cp={cp}", dense),
            ):
                why = prober(**degrees)
                if tally.rejects(setting, why, len(virtual) * len(banks)):
                    break
            if why is not None:
                continue
            for vpp in virtual:
                setting, why = _of_pipeline(prober, cut, depth, {**dense, "pp": pp, "vpp": vpp})
                if tally.rejects(setting, why, len(banks)):
                    continue
                for ep, etp in banks:
                    if tally.rejects(f"ep={ep}", prober(ep=ep), 1):
                        continue
                    if not tally.rejects(f"etp={etp}", prober(etp=etp), 1):
                        degrees = {**dense, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp}
                        legal.append(ParallelLayout.from_mapping({**degrees, "world": world}))
    return Candidates(total, tuple(legal), tuple(tally.found.values()))


def divisors_of(number: int) -> list[int]:
    """Return the divisors of ``number``, ascending."""
    low = [value for value in range(1, math.isqrt(number) + 1) if number % value == 0]
    return sorted({*low, *(number // value for value in low)})


def _splits(world: int, fixed: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    for tp in _kept(fixed, "tp", divisors_of(world)):
        for cp in _kept(fixed, "cp", divisors_of(world // tp)):
            for pp in _kept(fixed, "pp", divisors_of(world // tp // cp)):
                yield tp, cp, pp


def _banks(ranks: int, fixed: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [
        (ep, etp)
        for ep in _kept(fixed, "ep", divisors_of(ranks))
        for etp in _kept(fixed, "etp", divisors_of(ranks // ep))
    ]


def _kept(fixed: Mapping[str, Any], name: str, values: list[Any]) -> list[Any]:
    return [value for value in values if name not in fixed or value == fixed[name]]


def _of_pipeline(
    prober: _Prober, cut: Callable[[int], HybridPattern], depth: int, dense: dict[str, Any]
) -> tuple[str, Violation | None]:
    """Return what decides about depth and batch, and why it is illegal."""
    pp, vpp = dense["pp"], dense["vpp"]
    chunks, stages = pp * (vpp or 1), f"pp={pp}" + (f",vpp={vpp}" if vpp else "")
    if chunks > depth:
        message = f"{chunks} pipeline chunks (PP x VPP) need a layer each; the model has {depth}."
        return stages, Violation("VPP" if vpp else "PP", "too-many-chunks", message, ())
    split = dense["tp"] * dense["cp"]
    return f"tp*cp={split},{stages}", prober(cut(chunks), **dense)
