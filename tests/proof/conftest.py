"""The reference of a model: its weights, and one step on one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.step import StepResult, StepSpec, run_step, save_initial_weights
from nemo_megacpp.runtime.workers import WorkerPool

Reference = Callable[[StepSpec], tuple[str, StepResult]]


@pytest.fixture(scope="session")
def reference(ranks: WorkerPool, tmp_path_factory: Any) -> Reference:
    """Return a function from a spec to its weights' folder and its step on one rank, cached."""
    known: dict[str, tuple[str, StepResult]] = {}

    def of(spec: StepSpec) -> tuple[str, StepResult]:
        key = repr(spec)
        if key not in known:
            folder: Path = tmp_path_factory.mktemp("weights")
            one = ParallelLayout()
            ranks.run(1, save_initial_weights, spec, one, str(folder))
            known[key] = str(folder), ranks.run(1, run_step, spec, one, str(folder))[0]
        return known[key]

    return of
