"""Gathers recorded without NeMo, for tests of the analysis."""

from __future__ import annotations

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.gather_recorder import (
    GatherRecorder,
    RecordedGather,
    tell_parts_apart,
)
from nemo_megacpp.proof.step_result import disturb
from nemo_megacpp.proof.step_spec import StepSpec
from tests.bare import prepare


def record_bare(spec: StepSpec, layout: ParallelLayout) -> list[RecordedGather]:
    """Run one step of ``spec`` in ``layout``, on every rank of it, and return its gathers."""
    step = prepare(spec, layout)
    disturb(spec, step.chunks)
    tell_parts_apart(step.chunks)
    with GatherRecorder(step.chunks) as recorder:
        step.forward_backward()
    return recorder.gathers
