"""The schedule that activations are counted over, against Megatron's; the optimizer's shares."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_megacpp.contract.memory import (
    largest_optimizer_bytes,
    optimizer_bytes,
    peak_of_schedule,
    stage_buffers,
)
from nemo_megacpp.contract.stages import build_stages
from nemo_megacpp.formulas.sizes import Job
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import prepare


def _most_in_flight(spec: StepSpec, layout: ParallelLayout) -> tuple[int, ...]:
    """Count forward and backward passes of each chunk in a real step."""
    step = prepare(spec, layout)
    held, most = [0] * len(step.chunks), [0] * len(step.chunks)

    def watch(index: int, chunk: Any) -> None:
        def forward(module: Any, inputs: Any, output: Any) -> None:
            held[index] += 1
            most[index] = max(most[index], held[index])
            output.register_hook(backward)

        def backward(gradient: Any) -> None:
            held[index] -= 1

        chunk.register_forward_hook(forward)

    for index, chunk in enumerate(step.chunks):
        watch(index, chunk)
    step.forward_backward()
    return tuple(most)


@pytest.mark.parametrize(
    ("layout", "microbatches"), [("pp=4", 6), ("pp=4", 2), ("pp=2,vpp=2", 4), ("pp=4,vpp=3", 8)]
)
def test_microbatches_in_flight(ranks: WorkerPool, layout: str, microbatches: int) -> None:
    place = ParallelLayout.parse(layout)
    model = tiny_model("AMRAMRAMRAMR")
    spec = StepSpec(model, global_batch_size=microbatches)
    job = Job(model, place, 1, microbatches, precision="fp32")
    actual = ranks.run(place.world, _most_in_flight, spec, place)
    planned = [peak_of_schedule(job, stage, [1] * (place.vpp or 1))[1] for stage in range(place.pp)]
    assert planned == actual


def test_the_peak_weighs_chunks() -> None:
    job = Job({}, ParallelLayout.parse("pp=2,vpp=2"), 1, 4)
    # Three heavy and two light ones are held when the first light one goes back (302); the fourth
    # heavy one comes next, and with a light one in its place later no more is held than then.
    assert peak_of_schedule(job, 0, [100, 1]) == (401, (4, 2))


def test_the_distributed_optimizer_gives_every_element_one_owner() -> None:
    layout = ParallelLayout.parse("ep=2,world=8")
    job = Job(tiny_model("AEMR"), layout, 1, 8, precision="bf16", use_distributed_optimizer=True)
    (stage,) = build_stages(job)
    buffers = stage_buffers(job, stage)
    shares = [
        optimizer_bytes(job, [buffer], place, place)
        for buffer in buffers
        for place in range(4 if buffer.is_expert else 8)
    ]
    per_element = {2: 12, 4: 8}  # a float32 parameter is its own main parameter
    assert {p.element_size for p in stage.parameters} == set(per_element)
    whole = sum(per_element[p.element_size] * p.numel for p in stage.parameters)
    assert sum(shares) == whole
    assert largest_optimizer_bytes(job, buffers) < whole / 4
