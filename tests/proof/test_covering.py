"""Every setting that is accepted, with every axis: the same numbers as on one rank."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_megacpp.proof.compare import FLOAT32, FLOAT64, compare
from nemo_megacpp.proof.covering import LAYOUTS, SETTINGS, Case, bundles, cases
from nemo_megacpp.recipes.nemo.proof_run import run_step

from .conftest import Reference


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases()])
def test_settings(ranks: Any, reference: Reference, case: Case) -> None:
    """Losses, auxiliary losses, every gradient, its norm and every parameter after the steps."""
    weights, expected = reference(case.spec)
    result = ranks.run(case.layout.world, run_step, case.spec, case.layout, weights)[0]
    within = FLOAT64 if case.spec.dtype == "float64" else FLOAT32
    broken = [rung for rung in compare(expected, result, within) if not rung.holds]
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
