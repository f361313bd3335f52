"""Compare what a step gave in two layouts: the checks, and how far each number may differ.

In bfloat16 two layouts add the same numbers in another order and round at other places. How much
that may change a tensor depends on the model, so it is measured (TTrace, arXiv 2506.09280): the
one-rank step is run again a few times with its activations moved within rounding
(:func:`nemo_megacpp.proof.taps.perturb`). The farthest that a number moves is the estimate; a
difference beyond ``MULTIPLE`` times it is a fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

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


class Limit(NamedTuple):
    """What may differ.

    Attributes:
        tolerance: largest relative difference that passes.
        rounding: how far rounding moves the number, where that was measured.
    """

    tolerance: float
    rounding: float | None = None


class Limits(Protocol):
    """The limit of every number: the same for all of a kind, or one by one."""

    def limit(self, kind: Compared, key: str) -> Limit: ...


@dataclass(frozen=True)
class Tolerances:
    """Largest relative difference that rounding explains, by check.

    A tensor's difference is relative to its largest element. ``replicas`` is zero: ranks that hold
    the same parameter hold the same sum. ``gradients`` also holds for tensors inside the model.
    """

    forward: float
    aux_loss: float
    gradients: float
    gradient_norm: float
    step: float
    replicas: float = 0.0

    def limit(self, kind: Compared, key: str) -> Limit:
        """Return the limit of ``kind``, whatever the key."""
        if kind in ("output", "output gradient"):
            kind = "gradients"
        return Limit(getattr(self, kind.replace(" ", "_"), 0.0))


FLOAT64 = Tolerances(forward=1e-11, aux_loss=1e-6, gradients=1e-9, gradient_norm=1e-6, step=1e-9)
"""Megatron computes auxiliary losses and the gradient norm in float32 whatever the model is."""
FLOAT32 = Tolerances(forward=1e-6, aux_loss=1e-6, gradients=1e-5, gradient_norm=1e-5, step=1e-5)


@dataclass(frozen=True)
class Check:
    """One comparison: the number that goes farthest beyond its tolerance, or comes nearest to it.

    ``build``, ``tags`` and ``checkpoint`` count tensors instead: those that are missing, too many
    or of another shape; those whose tags do not agree with what ranks hold of them; and those that
    saving and loading changed.

    Attributes:
        name: what is compared.
        difference, tolerance: relative.
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
    return [
        _build(reference.parameters, result.parameters),
        _tags(result.tag_violations),
        *(
            _nearest_its_limit(kind, differences, limits)
            for kind, differences in step_differences(reference, result).items()
        ),
    ]


def step_differences(
    reference: StepResult, result: StepResult
) -> dict[CheckName, dict[str, float]]:
    """Return the relative difference of every number that a step gave, by check and key."""
    return {
        "forward": _series(reference.losses, result.losses),
        "aux loss": _aux_losses(reference.aux_losses, result.aux_losses),
        "gradients": _tensors(reference.gradients, result.gradients),
        "replicas": dict(result.gradients.replica_spread),
        "gradient norm": _series(reference.grad_norms, result.grad_norms),
        "step": _tensors(reference.parameters, result.parameters),
    }


def _nearest_its_limit(kind: CheckName, differences: Mapping[str, float], limits: Limits) -> Check:
    checks = []
    for key, difference in differences.items():
        tolerance, rounding = limits.limit(kind, key)
        checks.append(Check(kind, difference, tolerance, key, rounding))
    if not checks:
        tolerance, rounding = limits.limit(kind, "")
        return Check(kind, 0.0, tolerance, rounding=rounding)
    return max(checks, key=_excess)


def _excess(check: Check) -> tuple[float, float]:
    """Sort by difference over tolerance, then by difference; NaN and infinity come last."""
    if not np.isfinite(check.difference):
        return np.inf, np.inf
    if check.tolerance == 0.0:
        return (np.inf if check.difference else 0.0), check.difference
    return check.difference / check.tolerance, check.difference


def _relative(reference: float, value: float) -> float:
    return abs(value - reference) / max(abs(reference), np.finfo(float).tiny)


def _series(reference: Sequence[float], result: Sequence[float]) -> dict[str, float]:
    """Return the difference of one number a step, by the step's number if there are several."""
    if len(reference) != len(result):
        return {"": np.inf}
    names = [""] if len(reference) == 1 else [f"step {n + 1}" for n in range(len(reference))]
    return dict(zip(names, map(_relative, reference, result), strict=True))


def _aux_losses(reference: Mapping[str, float], result: Mapping[str, float]) -> dict[str, float]:
    return {
        name: _relative(reference[name], result[name])
        if name in reference and name in result
        else np.inf
        for name in {**reference, **result}
    }


def _build(reference: GlobalValues, result: GlobalValues) -> Check:
    """Count tensors that only one of the models holds, or that differ in global shape."""
    a, b = reference.values, result.values
    wrong = [
        key
        for key in sorted({**a, **b})
        if key not in a or key not in b or a[key].shape != b[key].shape
    ]
    return Check("build", float(len(wrong)), 0.0, wrong[0] if wrong else "")


def _tags(violations: Sequence[TagViolation]) -> Check:
    """Count parameters with a wrong tag, and describe the first one."""
    if not violations:
        return Check("tags", 0.0, 0.0)
    first = violations[0]
    return Check(
        "tags",
        float(len({violation.parameter for violation in violations})),
        0.0,
        first.parameter,
        problem=f"{first.problem}; {first.remedy}",
    )


def _tensors(reference: GlobalValues, result: GlobalValues) -> dict[str, float]:
    a, b = reference.values, result.values
    return {
        key: tensor_difference(a[key], b[key]) if key in a and key in b else np.inf
        for key in {**a, **b}
    }


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


MULTIPLE = 3.0
"""Twelve layouts of two hybrids moved no tensor by more than 1.1 times its estimate."""
SEEDS = (1, 2, 3)
"""Seeds of the perturbed steps."""

_EXACT = ("build", "tags", "replicas", "checkpoint")
_SINGLE_NUMBERS = ("forward", "aux loss", "gradient norm")


@dataclass(frozen=True)
class RoundingLimits:
    """Limits from movements that were measured, by kind and key.

    Rounding does not explain replicas that differ. The objective, the auxiliary losses and the
    gradient norm are single numbers, which a few seeds may leave in place by chance: they may
    always differ by one unit of rounding.
    """

    movements: dict[Compared, dict[str, float]]

    def limit(self, kind: Compared, key: str) -> Limit:
        """Return the limit of one number: ``MULTIPLE`` times its movement, and the movement."""
        if kind in _EXACT:
            return Limit(0.0)
        rounding = self.movements.get(kind, {}).get(key, 0.0)
        least = UNIT if kind in _SINGLE_NUMBERS else 0.0
        return Limit(max(MULTIPLE * rounding, least), rounding)


def rounding_limits(reference: StepResult, perturbed: Sequence[StepResult]) -> RoundingLimits:
    """Return limits from a step and the same step perturbed with each of ``SEEDS``.

    Tensors inside the model have limits if all the steps were traced.
    """
    movements: dict[Compared, dict[str, float]] = {}
    for step in perturbed:
        for kind, numbers in step_differences(reference, step).items():
            _grow(movements.setdefault(kind, {}), numbers)
        if reference.trace is None or step.trace is None:
            continue
        a, b = reference.trace, step.trace
        _grow(movements.setdefault("output", {}), _moved(a.outputs, b.outputs))
        _grow(movements.setdefault("output gradient", {}), _moved(a.gradients, b.gradients))
    return RoundingLimits(movements)


def _moved(reference: GlobalValues, perturbed: GlobalValues) -> dict[str, float]:
    return {
        key: tensor_difference(value, perturbed.values[key])
        for key, value in reference.values.items()
    }


def _grow(largest: dict[str, float], numbers: dict[str, float]) -> None:
    for key, number in numbers.items():
        largest[key] = max(largest.get(key, 0.0), number)
