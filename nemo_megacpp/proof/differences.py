"""The first tensor inside a model that two layouts disagree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from nemo_megacpp.proof.compare import Limits, Rung, RungName, step_differences, tensor_difference
from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.points import Point
from nemo_megacpp.proof.step import StepResult
from nemo_megacpp.proof.trace import Trace
from nemo_megacpp.proof.trial import Difference, Finding


def find(
    rungs: Sequence[Rung], reference: StepResult, result: StepResult, limits: Limits
) -> Finding:
    """Return where a trial began to differ.

    Args:
        rungs: of the trial; at least one does not hold.
        reference, result: its step on one rank and in the layout, traced.
        limits: of its numbers, and of the tensors inside the model.
    """
    assert reference.trace is not None and result.trace is not None
    broken = {rung.name: rung for rung in rungs if not rung.holds}
    kinds: tuple[RungName, ...] = ("tags", "gradients", "replicas", "step")
    named = [broken[name] for name in kinds if name in broken]
    inside = next(trace_differences(reference.trace, result.trace, limits), None)
    return Finding(
        rung=next(iter(broken)),
        parameter=named[0].where if named else "",
        first=inside or _last_parameter(reference, result, limits),
    )


def trace_differences(reference: Trace, result: Trace, limits: Limits) -> Iterator[Difference]:
    """Yield what differs: outputs as they are computed, then their gradients as they are.

    The backward pass runs from the last point to the first, so its first difference is at the
    point that comes last in the forward pass.
    """
    points = list(reference.points.values())
    yield from _differing("output", reference.outputs, result.outputs, points, limits)
    backwards = points[::-1]
    yield from _differing(
        "output gradient", reference.gradients, result.gradients, backwards, limits
    )


def _differing(
    kind: Literal["output", "output gradient"],
    reference: GlobalValues,
    result: GlobalValues,
    points: Sequence[Point],
    limits: Limits,
) -> Iterator[Difference]:
    for point in points:
        a, b = reference.values.get(point.name), result.values.get(point.name)
        if a is None and b is None:
            continue
        size = np.inf if a is None or b is None else tensor_difference(a, b)
        size = max(size, result.replica_spread.get(point.name, 0.0))
        tolerance, rounding = limits.limit(kind, point.name)
        if not size <= tolerance:
            yield Difference(
                kind,
                point.name,
                point.layer,
                point.family,
                size,
                tolerance,
                rounding,
                *_where_they_differ(a, b),
            )


def _last_parameter(reference: StepResult, result: StepResult, limits: Limits) -> Difference | None:
    """Return the parameter gradient that differs and is computed first: the last in depth. If none
    does, one whose replicas differ."""
    assert reference.trace is not None
    found: list[tuple[tuple[int, int], float, str, float, float | None, Point]] = []
    numbers = step_differences(reference, result)
    kinds: tuple[RungName, ...] = ("gradients", "replicas")
    for kind in kinds:
        for key, size in numbers[kind].items():
            tolerance, rounding = limits.limit(kind, key)
            if not size <= tolerance:
                point = _owner(key, reference.trace)
                found.append((point.order, size, key, tolerance, rounding, point))
        if found:
            break
    else:
        return None
    _, size, key, tolerance, rounding, point = max(found, key=lambda item: item[:2])
    a, b = (gradients.values.get(key) for gradients in (reference.gradients, result.gradients))
    return Difference(
        "parameter gradient",
        key.rpartition(".")[0],
        point.layer,
        point.family,
        size,
        tolerance,
        rounding,
        *_where_they_differ(a, b),
    )


def _where_they_differ(
    a: np.ndarray | None, b: np.ndarray | None
) -> tuple[float | None, float | None]:
    """Return the two numbers that are farthest apart."""
    if a is None or b is None or a.shape != b.shape:
        return None, None
    worst = int(np.abs(a - b).argmax())
    return float(a.flat[worst]), float(b.flat[worst])


def _owner(key: str, trace: Trace) -> Point:
    """Return the smallest watched module that holds the parameter ``key``."""
    holders = [point for name, point in trace.points.items() if f"{key}.".startswith(f"{name}.")]
    return max(holders, key=lambda point: len(point.name), default=trace.points["embedding"])
