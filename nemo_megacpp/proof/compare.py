"""Compare what a step gave in two layouts, rung by rung."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.step import StepResult

RungName = Literal[
    "forward", "aux loss", "gradients", "replicas", "gradient norm", "step", "checkpoint"
]


@dataclass(frozen=True)
class Tolerances:
    """Largest relative difference that rounding explains, per rung.

    A tensor's difference is relative to its largest element. ``replicas`` is zero: ranks that hold
    the same parameter hold the same sum.
    """

    forward: float
    aux_loss: float
    gradients: float
    gradient_norm: float
    step: float
    replicas: float = 0.0


FLOAT64 = Tolerances(forward=1e-11, aux_loss=1e-6, gradients=1e-9, gradient_norm=1e-6, step=1e-9)
"""Megatron computes auxiliary losses and the gradient norm in float32 whatever the model is."""
FLOAT32 = Tolerances(forward=1e-6, aux_loss=1e-6, gradients=1e-5, gradient_norm=1e-5, step=1e-5)


@dataclass(frozen=True)
class Rung:
    """One comparison: the largest relative difference, and where it was."""

    name: RungName
    difference: float
    tolerance: float
    where: str = ""

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance (never for a NaN)."""
        return self.difference <= self.tolerance


def compare(reference: StepResult, result: StepResult, tolerances: Tolerances) -> list[Rung]:
    """Return one rung per kind of number, in the order in which they are computed."""
    return [
        Rung("forward", _relative(reference.objective, result.objective), tolerances.forward),
        _aux_losses(reference, result, tolerances),
        _tensors("gradients", reference.gradients, result.gradients, tolerances.gradients),
        _replicas(result, tolerances),
        Rung(
            "gradient norm",
            _relative(reference.grad_norm, result.grad_norm),
            tolerances.gradient_norm,
        ),
        _tensors("step", reference.parameters, result.parameters, tolerances.step),
    ]


def _relative(reference: float, value: float) -> float:
    return abs(value - reference) / max(abs(reference), np.finfo(float).tiny)


def _aux_losses(reference: StepResult, result: StepResult, tolerances: Tolerances) -> Rung:
    if reference.aux_losses.keys() != result.aux_losses.keys():
        return Rung("aux loss", np.inf, tolerances.aux_loss, "names differ")
    worst = max(
        (
            (_relative(value, result.aux_losses[name]), name)
            for name, value in reference.aux_losses.items()
        ),
        default=(0.0, ""),
    )
    return Rung("aux loss", worst[0], tolerances.aux_loss, worst[1])


def _tensors(
    name: RungName, reference: GlobalValues, result: GlobalValues, tolerance: float
) -> Rung:
    missing = reference.values.keys() ^ result.values.keys()
    if missing:
        return Rung(name, np.inf, tolerance, f"only in one layout: {min(missing)}")
    worst, where = 0.0, ""
    for key, a in reference.values.items():
        difference = tensor_difference(a, result.values[key])
        if not difference <= worst:
            worst, where = difference, key
    return Rung(name, worst, tolerance, where)


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


def _replicas(result: StepResult, tolerances: Tolerances) -> Rung:
    spread = result.gradients.replica_spread
    where = max(spread, key=lambda key: spread[key], default="")
    return Rung("replicas", spread.get(where, 0.0), tolerances.replicas, where)
