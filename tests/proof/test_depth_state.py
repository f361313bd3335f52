"""R's depth-carried state: the same numbers in every layout, also where it crosses a cut."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.checks import FLOAT32, FLOAT64, compare
from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_result import StepResult
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from nemo_megacpp.specs.payload import StagePayload
from tests.path import run_step
from tests.proof.cases import DEPTH_STATE
from tests.reference import Reference
from tests.selection import slow_if

SERIAL = tiny_model("RMRR", m2rnn_depth_state=True, m2rnn_context_parallel="serial")
ALLGATHER = tiny_model("RER", m2rnn_depth_state=True, moe_token_dispatcher_type="allgather")
FULL = {"recompute_granularity": "full", "recompute_method": "uniform"}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["m2rnn"]}
FAST = "pp=2,vpp=2"


def _spec(model: dict[str, Any], **changes: Any) -> StepSpec:
    return StepSpec(model, **{"objective": "logits", "dtype": "float64", **changes})


def _broken(ranks: WorkerPool, reference: Reference, spec: StepSpec, text: str) -> list[Any]:
    layout, (weights, expected) = ParallelLayout.parse(text), reference(spec)
    result = ranks.run(layout.world, run_step, spec, layout, weights)[0]
    within = FLOAT64 if spec.dtype == "float64" else FLOAT32
    return [check for check in compare(expected, result, within) if not check.passed]


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(model, layout, id=f"{name}-{layout}", marks=slow_if(layout != FAST))
        for name, model, layouts in (
            (
                "state",
                DEPTH_STATE,
                (
                    *("tp=2", "tp=4", "tp=2,sp=false", "cp=2", "cp=4", "tp=2,cp=2"),
                    *("pp=2", "pp=4", FAST, "pp=2,vpp=4"),
                    *("tp=2,pp=2", "tp=2,sp=false,pp=2", "cp=2,pp=2"),
                ),
            ),
            ("serial", SERIAL, ("cp=2", "cp=4", "tp=2,cp=2", "tp=2,sp=false,cp=2", "cp=2,pp=2")),
            ("allgather", {**ALLGATHER, "num_layers": 6}, ("pp=2", "ep=2,pp=2")),
        )
        for layout in layouts
    ],
)
def test_float64(
    ranks: WorkerPool, reference: Reference, model: dict[str, Any], layout: str
) -> None:
    assert not _broken(ranks, reference, _spec(model), layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp=2,pp=2", "pp=2,vpp=2"])
def test_float32_loss(ranks: WorkerPool, reference: Reference, layout: str) -> None:
    spec = _spec(DEPTH_STATE, objective="loss", dtype="float32")
    assert not _broken(ranks, reference, spec, layout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("again", "layout"),
    [
        ({**FULL, "recompute_num_layers": 1}, "pp=2,vpp=2"),
        ({**FULL, "recompute_num_layers": 3}, "tp=2,pp=2"),
        ({**FULL, "recompute_method": "block", "recompute_num_layers": 2}, "cp=2,pp=2"),
        (SELECTIVE, "tp=2,pp=2"),
    ],
)
def test_recompute(
    ranks: WorkerPool, reference: Reference, again: dict[str, Any], layout: str
) -> None:
    """As without it, on one rank and in a layout."""
    weights, expected = reference(_spec(DEPTH_STATE))
    spec = _spec({**DEPTH_STATE, **again})
    for text in ("tp=1", layout):
        parsed = ParallelLayout.parse(text)
        result = ranks.run(parsed.world, run_step, spec, parsed, weights)[0]
        assert all(check.passed for check in compare(expected, result, FLOAT64)), text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("documents", "layout"),
    [((5, 2, 7, 2), "tp=2,pp=2"), ((8, 24, 16), "cp=2,pp=2"), ((8, 24, 16), "cp=4")],
)
def test_packs(
    ranks: WorkerPool, reference: Reference, documents: tuple[int, ...], layout: str
) -> None:
    model = {**DEPTH_STATE, "seq_length": sum(documents)}
    assert not _broken(ranks, reference, _spec(model, documents=documents), layout)


def _without_gradient(spec: StepSpec, layout: ParallelLayout, weights: GlobalValues) -> StepResult:
    unpack = StagePayload.unpack

    def cut_off(self: StagePayload, packed: torch.Tensor) -> Any:
        hidden, extras = unpack(self, packed)
        return hidden, {name: tensor.detach() for name, tensor in extras.items()}

    with mock.patch.object(StagePayload, "unpack", cut_off):
        result = run_step(spec, layout, weights)
    return result  # type: ignore[return-value]


@pytest.mark.slow
def test_a_gradient_that_does_not_cross_is_seen(ranks: WorkerPool, reference: Reference) -> None:
    spec, layout = _spec(DEPTH_STATE), ParallelLayout.parse("pp=2")
    weights, expected = reference(spec)
    result = ranks.run(2, _without_gradient, spec, layout, weights)[0]
    broken = [check for check in compare(expected, result, FLOAT64) if not check.passed]
    assert broken and all("gradient" in str(check) or "step" in str(check) for check in broken)
