"""Compare what a step gave in two layouts, rung by rung."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.step import StepResult
from nemo_megacpp.proof.tag_rules import Violation

RungName = Literal[
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
Compared = RungName | Literal["output", "output gradient"]
"""What has a tolerance: the rungs, and the tensors inside the model."""


class Limit(NamedTuple):
    """What may differ.

    Attributes:
        tolerance: largest relative difference that is no fault.
        rounding: how far rounding was seen to move the number, where that was measured.
    """

    tolerance: float
    rounding: float | None = None


class Limits(Protocol):
    """The limit of every number: the same for all of a kind, or one by one."""

    def limit(self, kind: Compared, key: str) -> Limit: ...


@dataclass(frozen=True)
class Tolerances:
    """Largest relative difference that rounding explains, per rung.

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
class Rung:
    """One comparison: the relative difference that goes farthest beyond its tolerance (or comes
    nearest to it), and where it was.

    ``build``, ``tags`` and ``checkpoint`` count tensors instead: those that are missing, too many
    or of another shape; those whose tags do not agree with what ranks hold of them; and those that
    saving and loading changed.
    """

    name: RungName
    difference: float
    tolerance: float
    where: str = ""
    rounding: float | None = None
    """How far rounding was seen to move this number, where that was measured (bf16)."""
    problem: str = ""
    """What is wrong and what to change, where that is known (``tags``)."""

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance (never for a NaN)."""
        return self.difference <= self.tolerance


def compare(reference: StepResult, result: StepResult, limits: Limits) -> list[Rung]:
    """Return one rung per kind of number, in the order in which they are computed."""
    return [
        _build(reference.parameters, result.parameters),
        _tags(result.tag_violations),
        *(
            _nearest_its_limit(kind, differences, limits)
            for kind, differences in step_differences(reference, result).items()
        ),
    ]


def step_differences(reference: StepResult, result: StepResult) -> dict[RungName, dict[str, float]]:
    """Return the relative difference of every number that a step gave, by rung and key."""
    return {
        "forward": _series(reference.losses, result.losses),
        "aux loss": _aux_losses(reference.aux_losses, result.aux_losses),
        "gradients": _tensors(reference.gradients, result.gradients),
        "replicas": dict(result.gradients.replica_spread),
        "gradient norm": _series(reference.grad_norms, result.grad_norms),
        "step": _tensors(reference.parameters, result.parameters),
    }


def _nearest_its_limit(kind: RungName, differences: Mapping[str, float], limits: Limits) -> Rung:
    rungs = []
    for key, difference in differences.items():
        tolerance, rounding = limits.limit(kind, key)
        rungs.append(Rung(kind, difference, tolerance, key, rounding))
    if not rungs:
        tolerance, rounding = limits.limit(kind, "")
        return Rung(kind, 0.0, tolerance, rounding=rounding)
    return max(rungs, key=_excess)


def _excess(rung: Rung) -> tuple[float, float]:
    """Sort by difference over tolerance, then by difference; what is no number comes last."""
    if not np.isfinite(rung.difference):
        return np.inf, np.inf
    if rung.tolerance == 0.0:
        return (np.inf if rung.difference else 0.0), rung.difference
    return rung.difference / rung.tolerance, rung.difference


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


def _build(reference: GlobalValues, result: GlobalValues) -> Rung:
    """Count tensors that only one of the models holds, or that differ in global shape."""
    a, b = reference.values, result.values
    wrong = [
        key
        for key in sorted({**a, **b})
        if key not in a or key not in b or a[key].shape != b[key].shape
    ]
    return Rung("build", float(len(wrong)), 0.0, wrong[0] if wrong else "")


def _tags(violations: Sequence[Violation]) -> Rung:
    """Count parameters with a wrong tag, and tell of the first one."""
    if not violations:
        return Rung("tags", 0.0, 0.0)
    first = violations[0]
    return Rung(
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
