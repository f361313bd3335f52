"""The plan against a recorded run: bytes and collectives exactly, activations within 10%.

What is recorded runs on gloo with the torch kernels. Where the no-GPU host replaces one of
Megatron's collectives by another that gloo has, the plan says what Megatron asks for, and
:func:`as_on_gloo` says what is recorded instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from nemo_megacpp.contract.memory import GRADIENT_BYTES, optimizer_bytes, stage_buffers
from nemo_megacpp.contract.stages import BuiltStage, build_stages
from nemo_megacpp.contract.traffic import microbatch_collectives, step_collectives
from nemo_megacpp.core.multi_token import missing_prediction
from nemo_megacpp.formulas.collectives import Collective
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.layout.placement import group_of
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.runtime.workers import WorkerPool
from tests.contract.recorded_jobs import (
    BALANCED,
    EXAMPLE,
    FULL,
    SELECTIVE,
    SIDE_CHANNELS,
    job_of,
    recorded,
)
from tests.record import Recorded
from tests.selection import slow_if

DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
MANY = {"global_batch_size": 8}


class Message(NamedTuple):
    """A collective between given ranks. For a send or a receive, ``ranks`` are this and the other.

    Fields as in :class:`nemo_megacpp.formulas.collectives.Collective`; bytes of one call.
    """

    kind: str
    ranks: tuple[int, ...]
    bytes: int


def messages_of_rank(
    sizes: Sizes,
    stage: BuiltStage,
    rank: int,
    carried_out: Callable[[Collective], Collective] = lambda collective: collective,
) -> Counter[Message]:
    """Return everything that ``rank`` of ``stage`` sends in one step by plan, and how often.

    Args:
        sizes, stage: the job, and the rank's stage of it.
        rank: a global rank on that stage.
        carried_out: what a machine makes of a collective that its backend does not have.
    """
    layout, found = sizes.layout, Counter[Message]()

    def add(collectives: Iterable[Collective], times: int) -> None:
        for made in map(carried_out, collectives):
            ranks = group_of(layout, rank, made.group)
            if made.neighbour:
                place = ranks.index(rank) + made.neighbour
                if made.group == "cp" and made.role == "hand-over" and not 0 <= place < len(ranks):
                    continue
                ranks = (rank, ranks[place % len(ranks)])
            found[Message(made.kind, ranks, made.bytes)] += made.count * times

    for _, layers, collectives in microbatch_collectives(sizes, [stage]):
        add(collectives, layers * sizes.job.num_microbatches)
    add(step_collectives(sizes, stage, stage_buffers(sizes.job, stage)), 1)
    return found


def as_on_gloo(collective: Collective) -> Collective:
    """Return a collective as the no-GPU host carries it out.

    Gloo reduces and scatters equal parts only: E's uneven reduce-scatters over etp become
    all-reduces (:mod:`nemo_megacpp.runtime.cpu_megatron`).
    """
    if (collective.kind, collective.group) == ("reduce_scatter", "etp"):
        return replace(collective, kind="all_reduce")
    return collective


def collectives_of(recorded: Recorded) -> Counter[Message]:
    found: Counter[Message] = Counter()
    for sent, count in recorded.collectives.items():
        p2p = sent.kind in ("send", "receive")
        ranks = sent.ranks if p2p else tuple(sorted(sent.ranks))
        found[Message(sent.kind, ranks, sent.bytes)] += count
    return found


def hold(ranks: WorkerPool, job: Job, **ddp: Any) -> None:
    runs = recorded(ranks, job, **ddp)
    stages: list[BuiltStage] = build_stages(job)
    sizes = Sizes(job)
    for rank, run in enumerate(runs):
        place = job.layout.rank_coordinates(rank)
        stage = stages[place.pp]
        buffers = stage_buffers(job, stage)
        dense = place.dp * job.layout.cp + place.cp
        assert sum(b.numel * b.element_size for b in buffers) == run.parameters
        assert sum(b.numel * GRADIENT_BYTES for b in buffers) == run.gradients
        assert optimizer_bytes(job, buffers, dense, place.edp) == run.optimizer
        planned = messages_of_rank(sizes, stage, rank, as_on_gloo)
        actual = collectives_of(run)
        assert planned - actual == actual - planned == Counter()


CASES: list[tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]]] = [
    ("A", {}, ("tp=2", "tp=2,sp=false", "cp=2", "tp=2,cp=2"), {}),
    ("A", {"recompute_granularity": "selective"}, ("cp=4", "cp=2"), {}),
    ("A", {"cp_comm_type": "p2p"}, ("cp=4",), {}),
    ("A", {"cp_comm_type": "all_gather"}, ("cp=4", "tp=2,cp=2"), {}),
    ("A", {"cp_comm_type": "a2a", **SELECTIVE}, ("tp=2,cp=2", "cp=4"), {}),
    ("M", {}, ("tp=2", "tp=2,sp=false", "cp=4", "tp=2,cp=2"), {}),
    ("M", {"mode": "mamba3"}, ("tp=2", "tp=2,sp=false", "cp=2", "tp=2,cp=2"), {}),
    (
        "M",
        {"mode": "mamba3", "mamba3_mimo_rank": 2, "mamba_num_groups": 2},
        ("tp=2,sp=false", "cp=4"),
        {},
    ),
    ("R", {}, ("tp=2", "tp=2,sp=false", "cp=2", "tp=2,cp=2"), {}),
    ("C", {"family_modules": [EXAMPLE]}, ("tp=2", "tp=2,sp=false", "cp=2", "tp=2,cp=2"), {}),
    ("R", {"m2rnn_context_parallel": "serial"}, ("cp=4", "tp=2,cp=2"), {}),
    ("F", {}, ("tp=2", "tp=2,sp=false", "cp=2", "tp=2,cp=2"), {}),
    ("FA", {**SELECTIVE, "recompute_modules": ["mlp"]}, ("tp=2,sp=false", "tp=2,cp=2"), {}),
    (
        "E",
        BALANCED,
        ("tp=2", "ep=4", "tp=2,etp=1", "tp=2,ep=2,etp=2", "tp=2,cp=2,ep=2,etp=1"),
        {},
    ),
    ("E", {"moe_token_dispatcher_type": "allgather"}, ("tp=2,etp=1", "tp=2,ep=2,etp=1"), {}),
    (
        "E",
        {
            **BALANCED,
            "moe_expert_capacity_factor": 1.0,
            "moe_router_load_balancing_type": "aux_loss",
        },
        ("tp=2,cp=2,ep=2,etp=1",),
        {},
    ),
    (
        "E",
        {**BALANCED, "moe_router_load_balancing_type": "aux_loss", "moe_z_loss_coeff": 1e-3},
        ("tp=2,cp=2,ep=2,etp=1", "ep=2,world=4"),
        {},
    ),
    ("E", {**BALANCED, **SELECTIVE, "recompute_modules": ["moe"]}, ("tp=2,ep=2,etp=1",), {}),
    (
        "MRMR",
        {
            **SELECTIVE,
            "mode": "mamba3",
            "recompute_modules": ["mamba", "m2rnn"],
            "m2rnn_context_parallel": "serial",
        },
        ("tp=2,sp=false", "cp=2,pp=2", "tp=2,cp=2"),
        {},
    ),
    (
        "AEMRAEMR",
        {**BALANCED, **FULL, "recompute_method": "uniform", "recompute_num_layers": 3},
        ("ep=2", "pp=2,vpp=2", "tp=2,cp=2,ep=2,etp=1"),
        {},
    ),
    (
        "AEEMRA",
        {**BALANCED, **FULL, "recompute_method": "block", "recompute_num_layers": 2},
        ("tp=2,pp=2,etp=1", "pp=2"),
        MANY,
    ),
    ("E", {**BALANCED, **SELECTIVE, "recompute_modules": ["shared_experts"]}, ("tp=2",), {}),
    (
        "AEMR",
        BALANCED,
        ("tp=2,cp=2,ep=4,etp=1", "tp=2,pp=2,etp=1", "ep=2,pp=2", "cp=2,pp=2", "pp=4", "world=4"),
        {},
    ),
    ("AEMR", BALANCED, ("tp=2,pp=2,etp=1", "ep=2"), {"precision": "bf16"}),
    ("AEMR", BALANCED, ("world=4", "ep=2,pp=2", "cp=2,world=4"), DISTRIBUTED),
    ("AEMR", BALANCED, ("world=4", "tp=2,etp=1,world=4"), {**DISTRIBUTED, "precision": "bf16"}),
    ("AEMEAEMEAEMR", BALANCED, ("pp=2,vpp=2", "pp=4,vpp=3", "tp=2,pp=2,vpp=2,etp=1"), MANY),
    ("AEMR", {**BALANCED, "mode": "mamba3"}, ("tp=2,cp=2,ep=2,etp=1",), {"precision": "bf16"}),
    (
        "MRARMRAM",
        {"m2rnn_depth_state": True},
        (
            *("tp=2,sp=false,pp=2", "cp=2,pp=2", "pp=4", "tp=2,pp=2", "pp=2,vpp=4"),
            *("pp=4,vpp=2", "tp=2,pp=2,vpp=2", "cp=2,pp=2,vpp=2"),
        ),
        MANY,
    ),
    (
        "RRMR",
        {
            **FULL,
            "recompute_method": "block",
            "recompute_num_layers": 1,
            "m2rnn_depth_state": True,
            "m2rnn_context_parallel": "serial",
        },
        ("tp=2,pp=2", "cp=2,pp=2"),
        {},
    ),
    ("ARM|EA", BALANCED, ("tp=2,pp=2,etp=1",), {}),
    ("AF|MF", {}, ("pp=2", "tp=2,pp=2"), {**DISTRIBUTED, "precision": "bf16"}),
    ("AMRA", {"side_channels": SIDE_CHANNELS}, ("tp=2,sp=false", "tp=2,pp=2"), {}),
    (
        "AMRA",
        {
            "side_channels": SIDE_CHANNELS,
            **FULL,
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        ("tp=2,pp=2",),
        {},
    ),
    ("ARM|EA", {**BALANCED, "share_embeddings_and_output_weights": True}, ("pp=2",), {}),
]
if missing_prediction() is None:
    CASES += [
        (
            "AEMR/EAFMR/EAFMR",
            BALANCED,
            ("cp=2", "tp=2,cp=2,etp=1", "tp=2,pp=2,etp=1", "pp=2,vpp=2", "tp=2,etp=1"),
            {},
        ),
        ("AM/AR", {}, ("tp=2,sp=false", "tp=2,pp=2"), {}),
        ("AM/AR", {}, ("pp=2,world=4", "pp=2"), {**DISTRIBUTED, "precision": "bf16"}),
    ]


@pytest.mark.parametrize(
    ("model", "layout", "run"),
    [
        pytest.param(
            tiny_model(pattern, **changes),
            layout,
            run,
            id=f"{pattern}-{number}-{layout}",
            marks=slow_if(
                layout != layouts[-1]
                or not {"side_channels", "cp_comm_type", "m2rnn_depth_state"}.isdisjoint(changes)
                or ("recompute_granularity" in changes and pattern != "AEMRAEMR")
            ),
        )
        for number, (pattern, changes, layouts, run) in enumerate(CASES)
        for layout in layouts
    ],
)
def test_bytes_and_collectives(
    ranks: WorkerPool, model: dict[str, Any], layout: str, run: dict[str, Any]
) -> None:
    hold(ranks, job_of(model, ParallelLayout.parse(layout), **run))


def test_what_is_routed_unevenly_sums_to_the_plan(ranks: WorkerPool) -> None:
    """Two experts of eight for each token: a rank's messages depend on the tokens, and the sum over
    the ranks that exchange them does not."""
    job = job_of(tiny_model("E"), ParallelLayout.parse("ep=4"))
    runs, (stage,), sizes = recorded(ranks, job), build_stages(job), Sizes(job)
    planned = [messages_of_rank(sizes, stage, rank) for rank in range(4)]
    actual = [collectives_of(run) for run in runs]

    def exchanged(messages: Counter[Message]) -> int:
        return sum(m.bytes * n for m, n in messages.items() if m.kind == "all_to_all")

    assert [exchanged(one) for one in actual] != [exchanged(one) for one in planned]
    assert sum(map(exchanged, actual)) == sum(map(exchanged, planned))


@pytest.mark.parametrize(
    ("layout", "run"),
    [
        ("world=2", OVERLAPPED),
        ("world=2", {"overlap_grad_reduce": True}),
        pytest.param("ep=2,pp=2,vpp=2", OVERLAPPED, marks=pytest.mark.slow),
    ],
)
def test_buckets_of_overlapped_reduction(
    ranks: WorkerPool, monkeypatch: pytest.MonkeyPatch, layout: str, run: dict[str, Any]
) -> None:
    """The first chunk has several; a parameter of 40 million elements would be slow to test."""
    monkeypatch.setattr("nemo_megacpp.contract.memory._BUCKET_ELEMENTS", 2000)
    monkeypatch.setattr("nemo_megacpp.contract.memory._BUCKET_ELEMENTS_PER_REPLICA", 1)
    job = job_of(tiny_model("AEMR", **BALANCED), ParallelLayout.parse(layout), **run)
    first, *others = build_stages(job)
    assert max(len(buffer.buckets) for buffer in stage_buffers(job, first)) > 2
    assert {len(b.buckets) for stage in others for b in stage_buffers(job, stage)} <= {1}
    hold(ranks, job, bucket_size=2000)
