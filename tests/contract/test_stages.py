"""Any rank of any world, built on the meta device: the same shapes as a real rank's, once each."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_megacpp.contract.ownership import ownership, parameter_count
from nemo_megacpp.contract.stages import build_rank, build_stages
from nemo_megacpp.errors import UserError
from nemo_megacpp.formulas.sizes import Job
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.recipes.catalog import NAM56R_MODEL
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import build_chunks, make_config

LAYOUTS = ("tp=2,cp=2,ep=4,etp=1,pp=2", "tp=2,ep=2,etp=2,pp=2,vpp=2", "ep=2,pp=4")


def job_of(layout: str, pattern: str = "AEMRAEMR", **changes: object) -> Job:
    return Job(tiny_model(pattern, **changes), ParallelLayout.parse(layout), precision="fp32")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_of_a_stage_hold_the_same_shapes(layout: str) -> None:
    job = job_of(layout)
    stages = build_stages(job)
    for rank in range(job.layout.world):
        built = build_rank(job, rank)
        assert built == stages[built.pp_rank]


def test_replicas_change_no_shape() -> None:
    job = job_of("tp=2,ep=2,etp=1,pp=2")
    wide = replace(job, layout=replace(job.layout, world_size=512))
    assert build_rank(wide, 300) == build_stages(job)[1]


def _shapes_of_a_real_rank(layout: ParallelLayout) -> list[tuple[str, tuple[int, ...]]]:
    start_model_parallel(layout)
    spec = StepSpec(tiny_model("AEMRAEMR"))
    return [
        (name, tuple(parameter.shape))
        for chunk in build_chunks(make_config(spec, layout), layout)
        for name, parameter in chunk.named_parameters()
    ]


def test_a_real_rank_holds_what_the_fake_one_does(ranks: WorkerPool) -> None:
    job = job_of("tp=2,pp=2,etp=1")
    stages = build_stages(job)
    for rank, shapes in enumerate(ranks.run(4, _shapes_of_a_real_rank, job.layout)):
        parameters = stages[job.layout.rank_coordinates(rank).pp].parameters
        for (name, shape), built in zip(shapes, parameters, strict=True):
            assert (name, math.prod(shape)) == (built.name, built.numel)


@pytest.mark.parametrize("layout", ["tp=8,pp=4,ep=8,etp=1", "tp=2,etp=1", "cp=2,ep=16,pp=13"])
def test_nam56r_has_its_parameters_in_every_layout(layout: str) -> None:
    (whole,) = build_stages(Job(NAM56R_MODEL))
    count = sum(parameter.numel for parameter in whole.parameters)
    assert count == 5_197_342_088
    job = Job(NAM56R_MODEL, ParallelLayout.parse(layout))
    assert parameter_count(ownership(job, build_stages(job))) == count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parts_make_the_whole(layout: str) -> None:
    job = job_of(layout)
    sizes = {"tp": job.layout.tp, "ep": job.layout.ep, "etp": job.layout.etp}
    for owned in ownership(job, build_stages(job)):
        parts = math.prod(sizes[by.split(" by ")[1]] for by in owned.split)
        assert owned.local_numel * parts == math.prod(owned.global_shape), owned


def test_words_for_what_is_whole() -> None:
    """The same parameter is invariant or replicated on tp, as SP and its use have it."""

    def words(layout: str) -> dict[str, str]:
        job = job_of(layout, "AR")
        return {f"{o.family} {o.name}": o.on["tp"] for o in ownership(job, build_stages(job))}

    with_sp, without = words("tp=2"), words("tp=2,sp=false")
    assert with_sp["A self_attention.linear_qkv.weight"] == "varying"
    norm = "A self_attention.linear_qkv.layer_norm_weight"
    assert (with_sp[norm], without[norm]) == ("replicated", "invariant")
    shared = "R mixer.in_proj.shared_weight"
    assert (with_sp[shared], without[shared]) == ("replicated", "replicated")


def test_the_process_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    build_rank(job_of("pp=2"), 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.distributed.is_initialized()


def _build_within_a_group() -> tuple[int, int]:
    job = job_of("tp=2,etp=1")
    owned = ownership(job, build_stages(job))
    ones = torch.ones(1)
    torch.distributed.all_reduce(ones)  # the group is still whole
    return parameter_count(owned), int(ones)


def test_a_callers_process_group_is_not_disturbed(ranks: WorkerPool) -> None:
    job = job_of("tp=1")
    expected = parameter_count(ownership(job, build_stages(job)))
    assert ranks.run(1, _build_within_a_group) == [(expected, 1)]


def test_a_family_without_formulas_is_not_priced_by_guess(tmp_path: Path) -> None:
    module = tmp_path / "family.py"
    module.write_text(
        "from nemo_megacpp.families import BlockFamily, register\n"
        "def spec(backend, settings): ...\n"
        "register(BlockFamily('Y', spec))\n"
    )
    with pytest.raises(UserError, match="Y blocks, whose family declares neither collectives nor"):
        Job(tiny_model("AY", family_modules=[str(module)]))
