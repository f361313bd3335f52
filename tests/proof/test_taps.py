"""Every watched tensor lies where its alignment says: in correct layouts all of them agree."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.checks import FLOAT64
from nemo_megacpp.proof.diagnosis import trace_differences
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_result import StepResult
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.proof.taps import Trace
from nemo_megacpp.runtime.workers import WorkerPool
from tests.path import run_step
from tests.reference import Reference
from tests.selection import slow_if

_ALL = tiny_model("AMER")
_MIMO = {"mode": "mamba3", "mamba3_mimo_rank": 2, "mamba_num_groups": 2}

CASES = [
    ("all", _ALL, ("tp=2,etp=1", "cp=2", "pp=2,vpp=2", "tp=1,etp=2", "tp=2,cp=2,ep=2,etp=1")),
    ("dp", _ALL, ("world=4", "world=4,tp=2,ep=2")),
    ("F", tiny_model("FAFM"), ("tp=2", "tp=2,cp=2,sp=false", "pp=2,vpp=2")),
    ("no SP", tiny_model("AMR"), ("tp=2,sp=false", "tp=2,cp=2,sp=false")),
    ("mamba3", tiny_model("AMER", mode="mamba3"), ("tp=2", "tp=2,pp=2", "tp=2,cp=2")),
    ("mimo", tiny_model("M", **_MIMO), ("tp=2,cp=2", "tp=2,sp=false")),
    ("serial R", tiny_model("R", m2rnn_num_heads=6), ("cp=4", "tp=2,cp=2")),
    ("allgather", tiny_model("E", moe_token_dispatcher_type="allgather"), ("tp=2,ep=2,etp=1",)),
]


def _spec(model: dict[str, Any]) -> StepSpec:
    return StepSpec(model, objective="logits", dtype="float64")


def _traced(
    ranks: WorkerPool, reference: Reference, spec: StepSpec, layout: ParallelLayout
) -> Trace:
    weights, _ = reference(spec)
    result: StepResult = ranks.run(layout.world, run_step, spec, layout, weights, True)[0]
    assert result.trace is not None
    return result.trace


@pytest.mark.parametrize(
    ("model", "layouts"),
    [pytest.param(*case[1:], id=case[0], marks=slow_if(case[0] != "all")) for case in CASES],
)
def test_every_tensor_agrees(
    ranks: WorkerPool, reference: Reference, model: dict[str, Any], layouts: tuple[str, ...]
) -> None:
    spec = _spec(model)
    expected = _traced(ranks, reference, spec, ParallelLayout())
    for text in layouts:
        trace = _traced(ranks, reference, spec, ParallelLayout.parse(text))
        assert list(trace.points) == list(expected.points), text
        for values in (trace.outputs.values, trace.gradients.values):
            assert values.keys() == trace.points.keys(), text
        assert not list(trace_differences(expected, trace, FLOAT64)), text


def test_what_is_watched(ranks: WorkerPool, reference: Reference) -> None:
    """In the order of execution, with its global shape, and with its layer's number and family."""
    trace = _traced(ranks, reference, _spec(_ALL), ParallelLayout.parse("pp=2,tp=2"))
    names = list(trace.points)
    assert [name.removeprefix("decoder.layers.") for name in names] == [
        "embedding",
        "0.self_attention.linear_qkv",
        "0.self_attention.core_attention",
        "0.self_attention.linear_proj",
        "0",
        "1.mixer.in_proj",
        "1.mixer.norm:scan",
        "1.mixer.out_proj:core",
        "1.mixer.out_proj",
        "1",
        "2.pre_mlp_layernorm",
        "2.mlp.shared_experts.linear_fc1",
        "2.mlp.shared_experts",
        "2.mlp.router",
        "2.mlp",
        "2",
        "3.norm",
        "3.mixer.in_proj:shared",
        "3.mixer.in_proj",
        "3.mixer.out_proj:core",
        "3.mixer.out_proj",
        "3",
        "decoder.final_norm",
        "output_layer",
    ]
    shapes = {name: value.shape for name, value in trace.outputs.values.items()}
    assert shapes["embedding"] == (16, 4, 48)
    assert shapes["decoder.layers.1.mixer.in_proj"] == (16, 4, 2 * 48 + 2 * 4 * 10 + 8)
    assert shapes["decoder.layers.2.mlp.router"] == (16, 4, 8)
    assert shapes["output_layer"] == (16, 4, 128)
    last = trace.points["decoder.layers.3.norm"]
    assert (last.layer, last.family) == (4, "R")
