"""The same weights in every layout give the same loss, gradients, gradient norm and step."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.checks import FLOAT32, FLOAT64, Limits, compare
from nemo_megacpp.proof.step_spec import StepSpec
from tests.path import run_step
from tests.proof.cases import FAMILIES, MIXED
from tests.reference import Reference
from tests.selection import slow_if, small_or_last


def _cases(*groups: Any, last_only: bool = False) -> list[Any]:
    """Return every model in every layout."""
    return [
        pytest.param(
            model,
            layout,
            id=f"{label}-{layout}",
            marks=slow_if(
                layout != layouts[-1] if last_only else not small_or_last(layout, layouts)
            ),
        )
        for group in groups
        for label, model, layouts in group
        for layout in layouts
    ]


def _hold(ranks: Any, reference: Reference, spec: StepSpec, text: str, within: Limits) -> None:
    layout = ParallelLayout.parse(text)
    weights, expected = reference(spec)
    result = ranks.run(layout.world, run_step, spec, layout, weights)[0]
    broken = [check for check in compare(expected, result, within) if not check.passed]
    assert not broken, broken


@pytest.mark.parametrize(
    ("model", "layout"),
    [*_cases(MIXED[:1]), *_cases(FAMILIES, MIXED[1:], last_only=True)],
)
def test_float64(ranks: Any, reference: Reference, model: dict[str, Any], layout: str) -> None:
    """Through a linear form of the logits, exact in float64: 1e-9 of each tensor's largest."""
    _hold(ranks, reference, StepSpec(model, objective="logits", dtype="float64"), layout, FLOAT64)


@pytest.mark.parametrize(("model", "layout"), _cases(MIXED, last_only=True))
def test_float32_loss(ranks: Any, reference: Reference, model: dict[str, Any], layout: str) -> None:
    """Through Megatron's cross entropy and gradient clipping, in float32: 1e-5."""
    _hold(ranks, reference, StepSpec(model, objective="loss", dtype="float32"), layout, FLOAT32)
