"""The reference of a model: its initial weights, and its steps on one rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.step_result import StepResult
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.path import run_step

Reference = Callable[[StepSpec], tuple[GlobalValues, StepResult]]


@pytest.fixture(scope="session")
def reference(ranks: WorkerPool) -> Reference:
    """Return a function from a spec to its weights and its steps on one rank, cached."""
    known: dict[str, tuple[GlobalValues, StepResult]] = {}

    def of(spec: StepSpec) -> tuple[GlobalValues, StepResult]:
        key = repr(spec)
        if key not in known:
            result: StepResult = ranks.run(1, run_step, spec, ParallelLayout())[0]
            known[key] = result.initial, result
        return known[key]

    return of
