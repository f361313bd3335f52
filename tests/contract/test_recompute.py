"""What recompute keeps, regains and computes again, by plan and in recorded steps."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core import parallel_state

from nemo_megacpp.contract.memory import peak_of_schedule
from nemo_megacpp.contract.recompute import Activations, recomputed_share, repeated_operations
from nemo_megacpp.contract.stages import build_stages
from nemo_megacpp.formulas.recompute import recompute_units
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.contract.recorded_jobs import BALANCED, FULL, SELECTIVE, job_of, spec_of
from tests.record import peak_of_saved

WITHIN = 0.05
PAIRS = {**FULL, "recompute_method": "uniform", "recompute_num_layers": 2}
FIRST = {**FULL, "recompute_method": "block", "recompute_num_layers": 1}


def _units(method: str, count: int, layers: int) -> list[range]:
    model = tiny_model("A", **FULL, recompute_method=method, recompute_num_layers=count)
    return recompute_units(Job(model).config(), layers)


def test_units() -> None:
    assert _units("uniform", 2, 5) == [range(0, 2), range(2, 4), range(4, 5)]
    assert _units("uniform", 9, 5) == [range(0, 5)]
    assert _units("block", 2, 5) == [range(0, 1), range(1, 2)]
    assert _units("block", 9, 2) == [range(0, 1), range(1, 2)]
    assert recompute_units(Job(tiny_model("A")).config(), 5) == []


def _peaks(specs: list[StepSpec], layout: ParallelLayout) -> list[int]:
    found = []
    for spec in specs:
        parallel_state.destroy_model_parallel()
        found.append(peak_of_saved(spec, layout))
    return found


FAMILIES: tuple[tuple[str, dict[str, Any], list[str]], ...] = (
    ("A", {}, ["core_attn"]),
    ("M", {}, ["mamba"]),
    ("M", {"mode": "mamba3"}, ["mamba"]),
    ("R", {}, ["m2rnn"]),
    ("E", BALANCED, ["moe"]),
    ("F", {}, ["mlp"]),
)


@pytest.mark.parametrize(
    ("layout", "forms"),
    [
        ("tp=1", (PAIRS,)),
        pytest.param("tp=2,cp=2", ({}, PAIRS, FIRST), marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_a_family(
    ranks: WorkerPool, layout: str, forms: tuple[dict[str, Any], ...]
) -> None:
    """The most that autograd keeps at once, with forms of recompute and with none."""
    where = ParallelLayout.parse(layout)
    jobs = [
        job_of(
            tiny_model(3 * letter, seq_length=256, **changes, **form), where, global_batch_size=2
        )
        for letter, changes, modules in FAMILIES
        for form in (*forms, {**SELECTIVE, "recompute_modules": modules})
    ]
    measured = ranks.run(where.world, _peaks, [spec_of(job) for job in jobs], where)[0]
    planned = [
        Activations(Sizes(job)).chunk(["embedding", *Sizes(job).letters, "head"]).peak
        for job in jobs
    ]
    ratios = [round(plan / real, 3) for plan, real in zip(planned, measured, strict=True)]
    assert planned == [pytest.approx(real, rel=WITHIN) for real in measured], ratios


def test_a_schedule_regains_one_microbatch_at_a_time() -> None:
    job = Job(tiny_model("AA"), ParallelLayout.parse("pp=2"), global_batch_size=8)
    assert peak_of_schedule(job, 0, [100]) == (200, (2,))
    assert peak_of_schedule(job, 0, [100], [7]) == (207, (2,))


@pytest.mark.parametrize(
    ("form", "least", "most"),
    [
        ({}, 0.0, 0.0),
        (FIRST, 0.05, 0.4),
        (PAIRS, 0.7, 0.99),  # all but embedding and head
        ({**SELECTIVE, "recompute_modules": ["core_attn"]}, 0.001, 0.1),
        ({**SELECTIVE, "recompute_modules": ["moe", "mamba", "m2rnn"]}, 0.4, 0.9),
        ({**SELECTIVE, "recompute_modules": ["shared_experts"]}, 0.01, 0.2),
        ({**SELECTIVE, "recompute_modules": ["layernorm"]}, 0.0, 0.0),
    ],
)
def test_operations_done_again(form: dict[str, Any], least: float, most: float) -> None:
    job = Job(tiny_model("AEMR", **form))
    (stage,) = build_stages(job)
    assert least <= recomputed_share(job.config(), stage.chunks) <= most


@pytest.mark.parametrize(
    ("letter", "module"), [("E", "moe"), ("M", "mamba"), ("R", "m2rnn"), ("F", "mlp")]
)
def test_a_mixer_is_done_again_as_a_whole(letter: str, module: str) -> None:
    """Its own module, and no other family's, repeats the operations of its layer."""
    model = tiny_model("EMRF", recompute_granularity="selective", recompute_modules=[module])
    sizes = Sizes(Job(model))
    work = {"E": 3, "M": 5, "R": 7, "F": 11}
    assert repeated_operations(sizes, work, ["EMRF"]) == work[letter]
