"""Every setting that is accepted, with every axis: the same numbers as on one rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.checks import FLOAT32, FLOAT64, SEEDS, Limits, compare, rounding_limits
from nemo_megacpp.proof.covering import LAYOUTS, SETTINGS, CoveringCase, bundles, cases
from nemo_megacpp.proof.step_spec import StepSpec
from tests.path import run_step
from tests.reference import Reference
from tests.selection import slow_if


@pytest.fixture(scope="module")
def rounding(ranks: Any, reference: Reference) -> Callable[[StepSpec], Limits]:
    """Return a function from a spec to what rounding to bfloat16 may move, cached."""

    @cache
    def of(name: str) -> Limits:
        weights, expected = reference(specs[name])
        one = ParallelLayout()
        moved = [
            ranks.run(1, run_step, specs[name], one, weights, False, seed)[0] for seed in SEEDS
        ]
        return rounding_limits(expected, moved)

    specs: dict[str, StepSpec] = {}

    def limits(spec: StepSpec) -> Limits:
        specs[repr(spec)] = spec
        return of(repr(spec))

    return limits


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=slow_if(number % 2 == 1))
        for number, case in enumerate(cases())
    ],
)
def test_settings(
    ranks: Any, reference: Reference, rounding: Callable[[StepSpec], Limits], case: CoveringCase
) -> None:
    """Losses, auxiliary losses, every gradient, its norm and every parameter after the steps."""
    weights, expected = reference(case.spec)
    result = ranks.run(case.layout.world, run_step, case.spec, case.layout, weights)[0]
    within: Limits = FLOAT64 if case.spec.dtype == "float64" else FLOAT32
    if case.spec.dtype == "bfloat16":
        within = rounding(case.spec)
    broken = [check for check in compare(expected, result, within) if not check.passed]
    assert not broken, broken


def test_every_pair_is_in_the_list() -> None:
    listed = {(setting.name, case.axis) for case in cases() for setting in case.settings}
    assert listed == {
        (setting.name, axis)
        for setting in SETTINGS
        for axis in LAYOUTS
        if setting.is_legal_on(axis)
    }
    experts = [setting for setting in SETTINGS if setting.is_of_experts]
    everywhere = [setting for setting in SETTINGS if setting.axes is None]
    assert len(listed) >= len(LAYOUTS) * len(everywhere) - len(experts)
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)


def test_a_bundle_has_every_one_of_its_settings_on() -> None:
    for bundle in bundles():
        for setting in bundle:
            assert all(setting.goes_with(other) for other in bundle), setting.name
