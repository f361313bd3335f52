"""Formulas of what autograd saves, against recorded runs of the torch kernels: within 5%, and those
of M on one rank to the byte."""

from __future__ import annotations

from typing import Any

import pytest
from torch.nn import functional as F

from nemo_megacpp.contract.recompute import saved_activations, saved_bytes
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.runtime.workers import WorkerPool
from tests.contract.recorded_jobs import (
    BALANCED,
    EXAMPLE,
    SELECTIVE,
    SIDE_CHANNELS,
    job_of,
    recorded,
)
from tests.selection import slow_if

WITHIN = 0.05
# Several chunks of the scans, and a length at which tokens outweigh what does not grow with them.
LONG = {"seq_length": 256}

ON_ONE_LAYER = [{**c, "owner": [0]} if "owner" in c else c for c in SIDE_CHANNELS]

CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("A", {}, ("tp=1", "tp=2,sp=false", "tp=2,cp=2")),
    ("A", {**SELECTIVE}, ("tp=2", "cp=2")),
    ("A", {"cp_comm_type": "p2p", "kv_channels": 16}, ("cp=2", "cp=4")),
    ("A", {"cp_comm_type": "all_gather"}, ("cp=4", "tp=2,cp=2")),
    ("A", {"cp_comm_type": "all_gather", "kv_channels": 16}, ("cp=2",)),
    ("A", {"cp_comm_type": "a2a"}, ("tp=2,cp=2", "cp=4")),
    ("A", {"cp_comm_type": "a2a", "kv_channels": 16}, ("cp=2",)),
    ("A", {"cp_comm_type": "a2a", **SELECTIVE}, ("cp=2",)),
    ("M", {}, ("tp=1", "tp=2,sp=false", "tp=2,cp=2")),
    ("M", {"mode": "mamba3"}, ("tp=1", "tp=2,sp=false", "tp=2,cp=2")),
    ("M", {"mode": "mamba3", "mamba3_mimo_rank": 2, "mamba_num_groups": 2}, ("tp=2",)),
    ("R", {}, ("tp=1", "tp=2,sp=false", "tp=2,cp=2")),
    ("R", {"m2rnn_context_parallel": "serial"}, ("tp=2,cp=2",)),
    ("R", {"m2rnn_depth_state": True}, ("tp=1",)),
    ("C", {"family_modules": [EXAMPLE]}, ("tp=1", "tp=2,cp=2")),
    ("A", {"side_channels": ON_ONE_LAYER}, ("tp=1", "tp=2,sp=false", "tp=2,cp=2")),
    ("E", BALANCED, ("tp=1", "tp=2", "tp=2,cp=2,ep=2,etp=1")),
    ("E", {**BALANCED, **SELECTIVE, "recompute_modules": ["moe"]}, ("ep=2",)),
    ("E", {**BALANCED, **SELECTIVE, "recompute_modules": ["shared_experts"]}, ("tp=2",)),
    ("M", {**SELECTIVE, "recompute_modules": ["mamba"]}, ("tp=2,cp=2",)),
    ("M", {**SELECTIVE, "recompute_modules": ["mamba"], "mode": "mamba3"}, ("tp=2",)),
    ("R", {**SELECTIVE, "recompute_modules": ["m2rnn"]}, ("tp=2",)),
    ("F", {}, ("tp=1", "tp=2,sp=false", "tp=2,cp=2")),
    ("F", {"gated_linear_unit": False, "activation_func": F.gelu}, ("tp=2",)),
    ("F", {**SELECTIVE, "recompute_modules": ["mlp"]}, ("tp=2",)),
]


@pytest.mark.parametrize(
    ("model", "layout", "precision"),
    [
        pytest.param(
            tiny_model(pattern, **LONG, **changes),
            layout,
            precision,
            id=f"{pattern}-{n}-{layout}-{precision}",
            marks=slow_if(
                precision == "bf16"
                or layout not in (layouts[0], layouts[-1])
                or not {"side_channels", "cp_comm_type", "m2rnn_depth_state"}.isdisjoint(changes)
            ),
        )
        for n, (pattern, changes, layouts) in enumerate(CASES)
        for layout in layouts
        for precision in ("fp32", "bf16")
        if precision == "fp32" or layout == layouts[0]
    ],
)
def test_a_family(ranks: WorkerPool, model: dict[str, Any], layout: str, precision: str) -> None:
    job = job_of(model, ParallelLayout.parse(layout), precision=precision)
    run = recorded(ranks, job)[0]
    planned = saved_bytes(Sizes(job))
    planned["0"] = planned.pop(model["hybrid_pattern"])
    assert planned == {
        place: pytest.approx(size, rel=WITHIN) for place, size in run.saved.items()
    }, {place: planned[place] / size for place, size in run.saved.items()}


MIMO = {"mode": "mamba3", "mamba3_mimo_rank": 2, "mamba_num_groups": 2}


@pytest.mark.parametrize("length", [32, 64, 128])  # half a chunk of the scan, one, two
@pytest.mark.parametrize("changes", [{}, {"mode": "mamba3"}, MIMO], ids=["native", "siso", "mimo"])
def test_the_scans_of_m_to_the_byte(
    ranks: WorkerPool, changes: dict[str, Any], length: int
) -> None:
    """Among them the states between chunks, of which Mamba-2 keeps none in a row of one chunk."""
    model = tiny_model("M", seq_length=length, **changes)
    for precision in ("fp32", "bf16"):
        job = job_of(model, ParallelLayout(), precision=precision)
        assert saved_bytes(Sizes(job))["M"] == recorded(ranks, job)[0].saved["0"], precision


def test_a_block_without_an_mlp_recomputes_none(ranks: WorkerPool) -> None:
    """The MLP of F is computed again; A saves what it saves without."""
    mlp = {**SELECTIVE, "recompute_modules": ["mlp"]}
    kept, again = (
        recorded(ranks, job_of(model, ParallelLayout(), precision="bf16"))[0].saved
        for model in (tiny_model("FA", **LONG), tiny_model("FA", **LONG, **mlp))
    )
    assert again["0"] < kept["0"] and again["1"] == kept["1"]


@pytest.mark.slow
def test_the_share_that_a_ring_saves(ranks: WorkerPool) -> None:
    """All that a block saves falls as 1/CP, keys and values too."""
    model = tiny_model("A", **LONG, kv_channels=16)
    two, four = (
        recorded(ranks, job_of(model, ParallelLayout.parse(f"cp={cp}")))[0].saved["0"]
        for cp in (2, 4)
    )
    assert two == 2 * four


def test_which_states_of_the_recurrence_are_saved() -> None:
    def states(**changes: object) -> dict[str, int]:
        job = Job(tiny_model("R", seq_length=1000, **changes), kernels="gpu")
        saved = saved_activations(Sizes(job), "R")
        return {item.what: item.bytes for item in saved if "of the recurrence" in item.what}

    size = 12 * 5 * 4 * 4  # heads, K, V, bytes
    assert states()["states of the recurrence, one in 64"] == 16 * size
    torch_form = states(m2rnn_kernel="torch")
    assert torch_form["states of the recurrence, one in 16"] == 63 * size
