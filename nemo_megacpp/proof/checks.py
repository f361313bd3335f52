"""Compare what a step gave in two layouts: the checks, and how far each number may differ.

In bfloat16 two layouts add the same numbers in another order and round at other places. How much
that may change a tensor depends on the model, so it is measured (TTrace, arXiv 2506.09280): the
one-rank step is run again a few times with its activations moved within rounding
(:func:`nemo_megacpp.proof.taps.perturb`). The farthest that a number moves is the estimate; a
difference beyond ``MULTIPLE`` times it is a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.step_result import StepResult
from nemo_megacpp.proof.tag_check import TagViolation
from nemo_megacpp.proof.taps import UNIT

CheckName = Literal[
    "build",
    "tags",
    "forward",
    "aux loss",
    "gradients",
    "replicas",
    "gradient norm",
    "step",
    "checkpoint",
]
Compared = CheckName | Literal["output", "output gradient"]
"""What has a tolerance: the checks, and the tensors inside the model."""

MULTIPLE = 3.0
"""Twelve layouts of two hybrids moved no tensor by more than 1.1 times its estimate."""
SEEDS = (1, 2, 3)
"""Seeds of the perturbed steps."""


class Limit(NamedTuple):
    """How far a number may differ.

    Attributes:
        tolerance: largest relative difference that passes.
        rounding: how far rounding moves the number, where that was measured.
    """

    tolerance: float
    rounding: float | None = None


@dataclass(frozen=True)
class Limits:
    """The limit of every number.

    A tensor's difference is relative to its largest element. What has no tolerance must be equal:
    ranks that hold the same parameter hold the same gradient, and the same value after the step.

    Attributes:
        tolerances: largest relative difference that rounding explains, by kind.
        movements: how far rounding was seen to move each number, by kind and key. Such a number may
            differ by ``MULTIPLE`` times that, and by its tolerance in any case.
    """

    tolerances: Mapping[Compared, float]
    movements: Mapping[Compared, Mapping[str, float]] = field(default_factory=dict)

    def limit(self, kind: Compared, key: str) -> Limit:
        """Return the limit of the number ``key``."""
        tolerance = self.tolerances.get(kind, 0.0)
        if not self.movements or kind in ("build", "tags", "replicas", "checkpoint"):
            return Limit(tolerance)
        rounding = self.movements.get(kind, {}).get(key, 0.0)
        return Limit(max(MULTIPLE * rounding, tolerance), rounding)


def _limits(
    forward: float, aux_loss: float, gradients: float, gradient_norm: float, step: float
) -> Limits:
    tolerances: dict[Compared, float] = {
        "forward": forward,
        "aux loss": aux_loss,
        "gradients": gradients,
        "output": gradients,
        "output gradient": gradients,
        "gradient norm": gradient_norm,
        "step": step,
    }
    return Limits(tolerances)


FLOAT64 = _limits(forward=1e-11, aux_loss=1e-6, gradients=1e-9, gradient_norm=1e-6, step=1e-9)
"""Megatron computes auxiliary losses and the gradient norm in float32 whatever the model is."""
FLOAT32 = _limits(forward=1e-6, aux_loss=1e-6, gradients=1e-5, gradient_norm=1e-5, step=1e-5)


def rounding_limits(reference: StepResult, perturbed: Sequence[StepResult]) -> Limits:
    """Return limits from a step and the same step perturbed with each of ``SEEDS``.

    Tensors inside the model have limits if all the steps were traced. The objective, the auxiliary
    losses and the gradient norm are single numbers, which a few seeds may leave in place by chance:
    they may always differ by one unit of rounding.
    """
    movements: dict[Compared, dict[str, float]] = {}
    for step in perturbed:
        moved: dict[Compared, dict[str, float]] = dict(step_differences(reference, step).items())
        if reference.trace is not None and step.trace is not None:
            moved["output"] = _tensors(reference.trace.outputs, step.trace.outputs)
            moved["output gradient"] = _tensors(reference.trace.gradients, step.trace.gradients)
        for kind, numbers in moved.items():
            largest = movements.setdefault(kind, {})
            largest |= {key: max(largest.get(key, 0.0), value) for key, value in numbers.items()}
    return Limits({"forward": UNIT, "aux loss": UNIT, "gradient norm": UNIT}, movements)


@dataclass(frozen=True)
class Check:
    """One comparison: the number that goes farthest beyond its tolerance, or comes nearest to it.

    ``build``, ``tags`` and ``checkpoint`` count tensors instead: those that are missing, too many
    or of another shape; those whose tags do not agree with what ranks hold of them; and those that
    saving and loading changed.

    Attributes:
        name: what is compared.
        difference: relative, or a count.
        tolerance: the largest difference that passes.
        where: key of the number.
        rounding: how far rounding moves this number, where that was measured (bfloat16).
        problem: what is wrong and what to change, where that is known (``tags``).
    """

    name: CheckName
    difference: float
    tolerance: float
    where: str = ""
    rounding: float | None = None
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance (never for a NaN)."""
        return self.difference <= self.tolerance


def compare(reference: StepResult, result: StepResult, limits: Limits) -> list[Check]:
    """Return one check per kind of number, in the order in which they are computed."""
    checks = [_build(reference.parameters, result.parameters), _tags(result.tag_violations)]
    found = step_differences(reference, result)
    for kind, differences in found.items():
        numbers = []
        for key, difference in (differences or {"": 0.0}).items():
            tolerance, rounding = limits.limit(kind, key)
            numbers.append(Check(kind, difference, tolerance, key, rounding))
        checks.append(max(numbers, key=_excess))
    return checks


def step_differences(
    reference: StepResult, result: StepResult
) -> dict[CheckName, dict[str, float]]:
    """Return the relative difference of every number that a step gave, by check and key."""
    return {
        "forward": _series(reference.losses, result.losses),
        "aux loss": _by_key(reference.aux_losses, result.aux_losses, _relative),
        "gradients": _tensors(reference.gradients, result.gradients),
        "replicas": {
            **result.gradients.replica_spread,
            **{f"{key} after the step": s for key, s in result.parameters.replica_spread.items()},
        },
        "gradient norm": _series(reference.grad_norms, result.grad_norms),
        "step": _tensors(reference.parameters, result.parameters),
    }


def _excess(check: Check) -> tuple[float, float]:
    """Sort by difference over tolerance, then by difference; NaN and infinity come last."""
    if not np.isfinite(check.difference):
        return np.inf, np.inf
    if check.tolerance == 0.0:
        return (np.inf if check.difference else 0.0), check.difference
    return check.difference / check.tolerance, check.difference


def _build(reference: GlobalValues, result: GlobalValues) -> Check:
    """Count tensors that only one of the models holds, or that differ in global shape."""
    shapes = [{k: v.shape for k, v in values.values.items()} for values in (reference, result)]
    wrong = sorted({key for key, _ in shapes[0].items() ^ shapes[1].items()})
    return Check("build", float(len(wrong)), 0.0, wrong[0] if wrong else "")


def _tags(violations: Sequence[TagViolation]) -> Check:
    """Count parameters with a wrong tag, and describe the first one."""
    if not violations:
        return Check("tags", 0.0, 0.0)
    first = violations[0]
    count = len({violation.parameter for violation in violations})
    problem = f"{first.problem}; {first.remedy}"
    return Check("tags", float(count), 0.0, first.parameter, problem=problem)


def _series(reference: Sequence[float], result: Sequence[float]) -> dict[str, float]:
    """Return the difference of one number a step, by the step's number if there are several."""
    if len(reference) != len(result):
        return {"": np.inf}
    names = [""] if len(reference) == 1 else [f"step {n + 1}" for n in range(len(reference))]
    return dict(zip(names, map(_relative, reference, result), strict=True))


def _tensors(reference: GlobalValues, result: GlobalValues) -> dict[str, float]:
    return _by_key(reference.values, result.values, tensor_difference)


_T = TypeVar("_T")


def _by_key(
    a: Mapping[str, _T], b: Mapping[str, _T], difference: Callable[[_T, _T], float]
) -> dict[str, float]:
    """Return the difference of each value; infinity where only one of the two has it."""
    return {
        key: difference(a[key], b[key]) if key in a and key in b else np.inf for key in {**a, **b}
    }


def _relative(reference: float, value: float) -> float:
    return abs(value - reference) / max(abs(reference), np.finfo(float).tiny)


def tensor_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return ``max|a - b| / max|a|``; infinity for other shapes, or for anything against zeros."""
    if a.shape != b.shape:
        return np.inf
    if a.size == 0:
        return 0.0
    scale, difference = float(np.abs(a).max()), float(np.abs(a - b).max())
    if scale == 0.0:
        return 0.0 if difference == 0.0 else np.inf
    return difference / scale
