"""The effect of a moved axis: in the contract, and in the records of two runs."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from nemo_megacpp.contract.plan import Plan
from nemo_megacpp.runs.curves import Curve


class Pair(NamedTuple):
    """A quantity on both sides.

    Attributes:
        name: of the quantity.
        a, b: its values; None where a side does not have it.
    """

    name: str
    a: float | None
    b: float | None

    @property
    def ratio(self) -> float | None:
        """``b / a``; None if it is not defined."""
        return None if not self.a or self.b is None else self.b / self.a


@dataclass(frozen=True)
class ContractEffect:
    """How two plans differ.

    Attributes:
        memory: bytes of the fullest rank of each, by kind.
        sent: bytes that all ranks send in a step: by group, in total, and between nodes.
        added, dropped: consequences that only the second, or only the first, has.
    """

    memory: tuple[Pair, ...]
    sent: tuple[Pair, ...]
    added: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class RunsEffect:
    """How two runs differ, over the steps that both recorded.

    Attributes:
        steps: number of steps that both recorded with a finite loss.
        first_step, first: the first of them, and the absolute difference of training loss there.
            If it is the runs' first step, the initial weights differ by that.
        last_step: the last of them.
        largest, at_step: largest absolute difference of training loss, in nats, and where.
        mean: mean absolute difference.
        loss: training loss at the last common step.
        heldout: held-out loss at the last common evaluation, and that step.
        heldout_step: None if there is none.
        seconds: median seconds of a step, each run's first one left out.
        tokens_per_second: median.
    """

    steps: int
    first_step: int | None
    first: float | None
    last_step: int | None
    largest: float | None
    at_step: int | None
    mean: float | None
    loss: Pair
    heldout: Pair
    heldout_step: int | None
    seconds: Pair
    tokens_per_second: Pair


def contract_effect(a: Plan, b: Plan) -> ContractEffect:
    """Return what differs between two plans."""
    kinds = ("parameters", "gradients", "optimizer", "activations", "total")
    memory = tuple(
        Pair(kind, getattr(a.fullest.memory, kind), getattr(b.fullest.memory, kind))
        for kind in kinds
    )
    one, two = _by_group(a), _by_group(b)
    groups = sorted({*one, *two}, key=lambda group: -max(one[group], two[group]))
    sent = [Pair(f"over {group}", one[group], two[group]) for group in groups]
    sent.append(Pair("in all", one.total(), two.total()))
    sent.append(Pair("between nodes", a.between_nodes, b.between_nodes))
    before, after = ([f"{c.axis} {c.effect} {c.message}" for c in plan.costs] for plan in (a, b))
    return ContractEffect(
        memory,
        tuple(sent),
        tuple(line for line in after if line not in before),
        tuple(line for line in before if line not in after),
    )


def _by_group(plan: Plan) -> Counter[str]:
    sent: Counter[str] = Counter()
    for stage in plan.stages:
        for item in stage.traffic:
            sent[item.group] += item.sent_bytes * stage.ranks
    return sent


def runs_effect(a: Curve, b: Curve) -> RunsEffect:
    """Return how two runs' records differ."""
    one, two = _finite(a.losses), _finite(b.losses)
    common = sorted(one.keys() & two.keys())
    gaps = {step: abs(one[step] - two[step]) for step in common}
    worst = max(gaps, key=lambda step: gaps[step]) if gaps else None
    last = common[-1] if common else None
    evaluated = sorted(_finite(a.heldout).keys() & _finite(b.heldout).keys())
    final = evaluated[-1] if evaluated else None
    return RunsEffect(
        len(common),
        common[0] if common else None,
        gaps[common[0]] if common else None,
        last,
        None if worst is None else gaps[worst],
        worst,
        statistics.fmean(gaps.values()) if gaps else None,
        # Steps count from 1.
        Pair("loss", one.get(last or 0), two.get(last or 0)),
        Pair("held-out loss", a.heldout.get(final or 0), b.heldout.get(final or 0)),
        final,
        Pair("seconds per step", _median(a, "seconds"), _median(b, "seconds")),
        Pair("tokens per second", *(_median(c, "tokens_per_second") for c in (a, b))),
    )


def _finite(values: dict[int, Any]) -> dict[int, float]:
    return {
        step: value for step, value in values.items() if value is not None and math.isfinite(value)
    }


def _median(curve: Curve, name: str) -> float | None:
    """Return the median of a metric, without the first step, which includes initialization."""
    values = [curve.steps[step].get(name) for step in sorted(curve.steps)[1:]]
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
