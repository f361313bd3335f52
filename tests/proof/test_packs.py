"""Rows that pack several documents: the same numbers in every layout."""

from __future__ import annotations

import pytest

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.cases import tiny_model
from nemo_megacpp.proof.compare import FLOAT64, compare
from nemo_megacpp.proof.step import StepSpec, run_step
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool

from .conftest import Reference

DOCUMENTS = (5, 1, 7, 3)


def _spec(mode: str, documents: tuple[int, ...] = DOCUMENTS) -> StepSpec:
    return StepSpec(
        tiny_model("AMER", mode=mode), objective="logits", dtype="float64", documents=documents
    )


@pytest.mark.parametrize("mode", ["nemo_native", "mamba3"])
def test_packs_in_layouts(ranks: WorkerPool, reference: Reference, mode: str) -> None:
    spec = _spec(mode)
    weights, expected = reference(spec)
    for text in ("tp=2,etp=1", "pp=2", "tp=2,pp=2,etp=1", "ep=2"):
        layout = ParallelLayout.parse(text)
        result = ranks.run(layout.world, run_step, spec, layout, weights)[0]
        broken = [rung for rung in compare(expected, result, FLOAT64) if not rung.holds]
        assert not broken, (text, broken)


def test_packing_changes_the_numbers(reference: Reference) -> None:
    """Else the boundaries would have been ignored."""
    _, packed = reference(_spec("nemo_native"))
    _, whole = reference(_spec("nemo_native", ()))
    assert abs(packed.objective - whole.objective) > 1e-6 * abs(whole.objective)


def test_packs_with_cp_are_refused(ranks: WorkerPool, reference: Reference) -> None:
    spec = _spec("nemo_native")
    weights, _ = reference(spec)
    with pytest.raises(WorkerError, match="Packed sequences with CP=2"):
        ranks.run(2, run_step, spec, ParallelLayout(context_parallel_size=2), weights)
