"""How far bfloat16 rounding alone moves every number of a step, so that it is told from a fault.

Two layouts add the same bfloat16 numbers in another order and round at other places. How much that
may change a tensor depends on the model, so it is measured (TTrace, arXiv 2506.09280): the one-rank
step is run again a few times with its activations moved within rounding
(:mod:`nemo_megacpp.proof.perturb`). The farthest that a number moves is the estimate; a difference
beyond ``MULTIPLE`` times it is a fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_megacpp.proof.compare import Compared, Limit, step_differences, tensor_difference
from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.perturb import UNIT
from nemo_megacpp.proof.step import StepResult

MULTIPLE = 3.0
"""Twelve layouts of two hybrids moved no tensor by more than 1.1 times its estimate."""
SEEDS = (1, 2, 3)
"""Of the perturbed steps."""

_EXACT = ("build", "tags", "replicas", "checkpoint")
_SINGLE_NUMBERS = ("forward", "aux loss", "gradient norm")


@dataclass(frozen=True)
class RoundingLimits:
    """Limits from movements that were measured, by kind and key.

    Whether replicas agree is no matter of rounding. The objective, the auxiliary losses and the
    gradient norm are single numbers, which a few tries can leave in place by chance: one unit of
    rounding is allowed to them in any case.
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
