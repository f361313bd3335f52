"""Composed prices equal the plan of the real modules; candidates are all there, each once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import product
from typing import Any

import pytest

from nemo_megacpp.contract.candidates import all_layouts
from nemo_megacpp.contract.layout_plan import make_plan
from nemo_megacpp.contract.layout_search import search_layouts
from nemo_megacpp.contract.machine_presets import PRESETS
from nemo_megacpp.core.multi_token import missing_prediction
from nemo_megacpp.formulas.sizes import Job
from nemo_megacpp.layout import ModelShape, ParallelLayout, is_legal
from nemo_megacpp.layout.rules import divisors_of
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.views import job_of, shape_of

H100 = PRESETS["dgx-h100"]


def _case(name: str, *overrides: str, **hardware: Any) -> tuple[Job, ModelShape]:
    recipe = dataclasses.replace(resolve(name, overrides), layout=ParallelLayout())
    return job_of(recipe, **hardware), shape_of(recipe)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("share_embeddings_and_output_weights=true",), marks=pytest.mark.slow),
        (
            *("use_distributed_optimizer=true", "precision=bf16", "recompute_granularity=full"),
            *("recompute_method=block", "recompute_num_layers=2"),
        ),
        pytest.param(
            (
                "recipe=nam56r_tiny_mamba3",
                *("recompute_granularity=selective", "recompute_modules=[mamba,m2rnn,moe]"),
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(("pattern=AMR", "num_layers=6"), marks=pytest.mark.slow),
        pytest.param(
            (
                *("pattern=AMRE/AR/AR", "num_layers=8", "precision=bf16"),
                *("use_distributed_optimizer=true", "recompute_granularity=selective"),
                "recompute_modules=[core_attn,m2rnn]",
            ),
            marks=pytest.mark.skipif(missing_prediction() is not None, reason="0.19 has it"),
        ),
    ],
    ids=["tied", "distributed-full", "mamba3-selective", "without-experts", "prediction"],
)
def test_prices_equal_the_plan(overrides: tuple[str, ...]) -> None:
    job, shape = _case(
        "nam56r_tiny", *overrides, "micro_batch_size=1", "global_batch_size=16", gpus_per_node=4
    )
    machine = dataclasses.replace(H100, gpus_per_node=4)
    found = search_layouts(job, shape, 8, machine)
    assert len(found.fitting) > 20
    for priced in found.fitting[:: max(1, len(found.fitting) // 12)]:
        model = {**job.model, "hybrid_pattern": str(priced.pattern)}
        plan = make_plan(dataclasses.replace(job, layout=priced.layout, model=model), machine)
        assert plan.step is not None and priced.step is not None
        assert plan.step.seconds == pytest.approx(priced.step.seconds, rel=1e-12)
        assert plan.step.utilization == pytest.approx(priced.step.utilization, rel=1e-12)
        assert [stage.memory for stage in plan.stages] == list(priced.stages)
        sent = sum(item.sent_bytes * stage.ranks for stage in plan.stages for item in stage.traffic)
        # Totals round once per group and stage; here once per group and node offset.
        assert priced.sent == pytest.approx(sent, rel=1e-9, abs=1000)
        assert priced.between_nodes == pytest.approx(plan.between_nodes, rel=1e-9, abs=1000)


def test_every_layout_is_counted_once_and_legality_is_that_of_the_rules() -> None:
    _, shape = _case("nam56r_tiny", "micro_batch_size=1", "num_moe_experts=4", "moe_router_topk=2")
    world, gpus = 8, 4
    halves = {n: HybridPattern(shape.pattern.families, _equal(n)) for n in range(1, 13)}
    found = all_layouts(shape, world, gpus, halves.__getitem__)
    expected = []
    total = 0
    for tp, cp, pp in product(divisors_of(world), repeat=3):
        if world % (tp * cp * pp):
            continue
        for sp, vpp, ep, etp in product(
            (True, False) if tp > 1 else (False,),
            (None, 2, 4, 8) if pp > 1 else (None,),
            *[divisors_of(world)] * 2,
        ):
            if world % (etp * ep * pp):
                continue
            total += 1
            chunks = pp * (vpp or 1)
            layout = ParallelLayout(tp, sp, cp, pp, vpp, ep, etp, world)
            if chunks <= 12 and is_legal(
                layout, dataclasses.replace(shape, pattern=halves[chunks]), gpus_per_node=gpus
            ):
                expected.append(layout)
    assert found.total == total
    assert expected and Counter(found.legal) == Counter(expected)
    assert sum(rejection.layouts for rejection in found.rejected) == total - len(expected)
    assert all(rejection.message and rejection.layouts > 0 for rejection in found.rejected)


def _equal(n: int) -> tuple[int, ...]:
    return tuple(round(12 * chunk / n) for chunk in range(1, n))


def test_what_fits_comes_first_and_then_the_shortest_step() -> None:
    job, shape = _case("nam56r", hbm_bytes=20 * 10**9)
    found = search_layouts(job, shape, 16, H100, {"vpp": None, "cp": 1})
    assert found.fitting and found.too_big
    assert all(priced.memory <= 20 * 10**9 for priced in found.fitting)
    assert all(priced.memory > 20 * 10**9 for priced in found.too_big)
    keys = [(p.step.seconds, p.between_nodes) for p in found.fitting if p.step is not None]
    assert len(keys) == len(found.fitting) and keys == sorted(keys)
    assert [p.memory for p in found.too_big] == sorted(p.memory for p in found.too_big)
    assert all(p.layout.cp == 1 and p.layout.vpp is None for p in found.ranked)
    again = search_layouts(job, shape, 16, H100, {"vpp": None, "cp": 1})
    assert [p.layout for p in again.ranked] == [p.layout for p in found.ranked]


def test_nam56r_on_64_gpus_prefers_tp4_to_tp8_and_experts_inside_a_node() -> None:
    """By bytes between nodes, TP=8 came first, with twice the bytes of TP=4 in all."""
    job, shape = _case("nam56r", hbm_bytes=H100.hbm_bytes)
    found = search_layouts(job, shape, 64, H100, {"vpp": None, "cp": 1, "pp": 4})
    first = {}
    for place, priced in enumerate(found.fitting):
        first.setdefault(priced.layout.tp, place)
    assert first[1] < first[2] < first[4] < first[8]
    by_experts = search_layouts(job, shape, 64, H100, {"vpp": None, "cp": 1, "pp": 1, "tp": 1})
    places = [p.layout.ep for p in by_experts.fitting if p.layout.etp == 1]
    assert places.index(8) < places.index(16)  # 16 experts over two nodes


def test_cuts_by_memory_where_cuts_by_work_do_not_fit() -> None:
    job, shape = _case("nam56r")
    fixed = {"tp": 1, "cp": 1, "pp": 4, "vpp": None, "ep": 1, "etp": 1}
    (by_work,) = search_layouts(job, shape, 4, H100, fixed).fitting
    limit = by_work.memory - 1
    found = search_layouts(dataclasses.replace(job, hbm_bytes=limit), shape, 4, H100, fixed)
    (by_memory,) = found.ranked
    assert by_memory.balance == "memory"
    assert by_memory.memory <= limit
    assert by_memory.heaviest > by_work.heaviest
