"""The plan of a model with prediction depths: what they hold and compute, on the last stage."""

from __future__ import annotations

import pytest

from nemo_megacpp.contract.layout_plan import make_plan, plan_document
from nemo_megacpp.contract.machine_presets import PRESETS
from nemo_megacpp.contract.stages import build_rank, build_stages
from nemo_megacpp.contract.work import step_operations
from nemo_megacpp.core.multi_token import missing_prediction
from nemo_megacpp.formulas.sizes import Job
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.runtime.workers import WorkerPool
from tests.contract.recorded_jobs import job_of, spec_of
from tests.record import peak_of_saved

pytestmark = pytest.mark.skipif(missing_prediction() is not None, reason=str(missing_prediction()))

MODEL = tiny_model("AEMR/EAFMR/EAFMR")


def _job(layout: str = "tp=1", **model: object) -> Job:
    return Job(
        {**MODEL, **model}, ParallelLayout.parse(layout), global_batch_size=16, precision="fp32"
    )


@pytest.mark.parametrize("layout", ["tp=2,pp=2,etp=1", "ep=2,pp=4", "pp=2,vpp=2"])
def test_parameters_are_those_of_the_built_model(layout: str) -> None:
    """Each once, though the last stage has a copy of the embedding."""
    (whole,) = build_stages(_job())
    count = sum(parameter.numel for parameter in whole.parameters)
    plan = make_plan(_job(layout), PRESETS["dgx-h100"])
    assert plan.parameters == count
    first, *_, last = plan.stages
    depths = {o.name: o.layers for o in plan.owned if o.family == "prediction"}
    assert depths == {
        f"{name}.weight": 2 for name in ("enorm", "hnorm", "eh_proj", "final_layernorm")
    }
    assert {o.layers for o in plan.owned if o.family == "F"} == {2}
    copies = [p for stage in (first, last) for p in stage.built.parameters if p.end == "embedding"]
    assert len([p for p in copies if p.layer is None]) == 2
    chunk = plan_document(plan)["stages"][-1]["chunks"][-1]
    assert (chunk["depth_layers"], chunk["depths"], chunk["head"]) == ("EAFMR", 2, True)
    assert last.letters.endswith("/EAFMR/EAFMR") and "/" not in first.letters
    assert plan.step is not None and plan.step.seconds > 0


def test_the_work_of_the_depths_is_counted() -> None:
    """A depth computes its layers, its projection and the head again; the sum over stages is that
    of the whole model."""
    plain = _job(hybrid_pattern="AEMREAFMREAFMR")
    one, more = (
        step_operations(job.config(), build_stages(job)[0].chunks, tokens=1)
        for job in (plain, _job())
    )
    width, vocabulary = MODEL["hidden_size"], 128
    assert more - one == 3 * 2 * (2 * 2 * width * width + 2 * width * vocabulary)
    staged = _job("pp=2")
    chunks = [stage.chunks[0] for stage in build_stages(staged)]
    assert sum(step_operations(staged.config(), [c], tokens=1) for c in chunks) == more


def test_every_rank_of_the_last_stage_holds_the_same() -> None:
    job = _job("tp=2,ep=2,etp=1,pp=2")
    stages = build_stages(job)
    for rank in range(job.layout.world):
        built = build_rank(job, rank)
        assert built == stages[built.pp_rank]


@pytest.mark.parametrize("layout", ["tp=1", "tp=2,etp=1"])
def test_saved_activations(ranks: WorkerPool, layout: str) -> None:
    """The most that autograd keeps in a step, by formula: within 5%."""
    model = tiny_model("A/AFR/AFR", seq_length=256)
    place = ParallelLayout.parse(layout)
    job = job_of(model, place)
    actual = ranks.run(place.world, peak_of_saved, spec_of(job), place)[0]
    (stage,) = make_plan(job).stages
    assert stage.memory.activations == pytest.approx(actual, rel=0.05)
