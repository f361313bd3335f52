"""The first tensor inside a model that two layouts disagree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nemo_megacpp.proof.checks import (
    Check,
    CheckName,
    Limit,
    Limits,
    step_differences,
    tensor_difference,
)
from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.step_result import StepResult
from nemo_megacpp.proof.taps import Point, Trace

TraceKind = Literal["output", "output gradient"]
DifferenceKind = TraceKind | Literal["parameter gradient"]


@dataclass(frozen=True)
class TensorDifference:
    """A tensor inside the model that a layout changes.

    Attributes:
        kind: what differs: what a module computes, the gradient of that, or a parameter's gradient.
        module: the module that it belongs to, named as in a checkpoint. ``:core`` is what its
            output projection is given, ``:scan`` what a mixer's norm is given, ``:shared`` the part
            of a projection that all tensor-parallel ranks compute.
        layer: global number of the module's layer, from 1; None outside layers.
        family: letter of the layer, or None.
        difference: relative to the largest element; between replicas if that is more.
        tolerance: the largest difference that passes.
        rounding: how far rounding moves it (bfloat16), else None.
        expected: the number on one rank where the tensors differ most; None if there is none.
        found: the same number in the layout.
    """

    kind: DifferenceKind
    module: str
    layer: int | None
    family: str | None
    difference: float
    tolerance: float
    rounding: float | None
    expected: float | None
    found: float | None


@dataclass(frozen=True)
class Diagnosis:
    """Where the numbers of a case begin to differ.

    Attributes:
        check: the first check that failed.
        parameter: the parameter with a wrong tag, else the one farthest beyond its tolerance, by
            its gradient, else after the step; empty if every parameter agrees.
        first: the first tensor that differs. Outputs are compared in the order of the forward
            pass, then their gradients in the order of the backward pass; where all of these agree,
            a parameter's gradient is summed wrongly. None if nothing inside the model differs.
        axis: the axis, or the axes together, that make it differ.
    """

    check: CheckName
    parameter: str
    first: TensorDifference | None
    axis: str = ""


def diagnose(
    checks: Sequence[Check], reference: StepResult, result: StepResult, limits: Limits
) -> Diagnosis:
    """Return where the numbers of a case begin to differ.

    Args:
        checks: of the case; at least one failed.
        reference, result: its step on one rank and in the layout, traced.
        limits: of its numbers, and of the tensors inside the model.
    """
    assert reference.trace is not None and result.trace is not None
    failed = {check.name: check for check in checks if not check.passed}
    kinds: tuple[CheckName, ...] = ("tags", "gradients", "replicas", "step")
    inside = next(trace_differences(reference.trace, result.trace, limits), None)
    return Diagnosis(
        check=next(iter(failed)),
        parameter=next((failed[kind].where for kind in kinds if kind in failed), ""),
        first=inside or _first_gradient(reference, result, limits),
    )


def trace_differences(
    reference: Trace, result: Trace, limits: Limits
) -> Iterator[TensorDifference]:
    """Yield what differs: outputs in the order of the forward pass, then their gradients in the
    order of the backward pass."""
    points = list(reference.points.values())
    kinds: tuple[tuple[TraceKind, GlobalValues, GlobalValues, list[Point]], ...] = (
        ("output", reference.outputs, result.outputs, points),
        ("output gradient", reference.gradients, result.gradients, points[::-1]),
    )
    for kind, expected, found, order in kinds:
        for point in order:
            a, b = expected.values.get(point.name), found.values.get(point.name)
            if a is None and b is None:
                continue
            size = np.inf if a is None or b is None else tensor_difference(a, b)
            size = float(np.maximum(size, found.replica_spread.get(point.name, 0.0)))  # NaN stays
            limit = limits.limit(kind, point.name)
            if not size <= limit.tolerance:
                yield _difference(kind, point.name, point, size, limit, a, b)


def _first_gradient(
    reference: StepResult, result: StepResult, limits: Limits
) -> TensorDifference | None:
    """Return the parameter gradient that differs and is computed first: the last in depth. If none
    does, one whose replicas differ."""
    assert reference.trace is not None
    differences = step_differences(reference, result)["gradients"]
    numbers: dict[CheckName, dict[str, float]] = {
        "gradients": differences,
        "replicas": result.gradients.replica_spread,
    }
    for kind, sizes in numbers.items():
        found: list[tuple[tuple[int, int], float, str, Limit, Point]] = []
        for key, size in sizes.items():
            limit = limits.limit(kind, key)
            if not size <= limit.tolerance:
                point = _owner(key, reference.trace)
                found.append((point.order, size, key, limit, point))
        if found:
            _, size, key, limit, point = max(found, key=lambda item: item[:2])
            a, b = (step.gradients.values.get(key) for step in (reference, result))
            module = key.rpartition(".")[0]
            return _difference("parameter gradient", module, point, size, limit, a, b)
    return None


def _difference(
    kind: DifferenceKind,
    module: str,
    point: Point,
    size: float,
    limit: Limit,
    a: np.ndarray | None,
    b: np.ndarray | None,
) -> TensorDifference:
    """Return the difference, with the two numbers that are farthest apart."""
    expected = found = None
    if a is not None and b is not None and a.shape == b.shape:
        worst = int(np.abs(a - b).argmax())
        expected, found = float(a.flat[worst]), float(b.flat[worst])
    return TensorDifference(kind, module, point.layer, point.family, size, *limit, expected, found)


def _owner(key: str, trace: Trace) -> Point:
    """Return the smallest watched module that holds the parameter ``key``."""
    holders = [point for name, point in trace.points.items() if f"{key}.".startswith(f"{name}.")]
    return max(holders, key=lambda point: len(point.name), default=trace.points["embedding"])
