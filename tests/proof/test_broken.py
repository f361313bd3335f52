"""The proof sees what it is there to see: faults made on purpose, named by rung and parameter."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from megatron.core.ssm.mamba_context_parallel import _all_to_all_cp2hp

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers import m2rnn
from nemo_megacpp.proof.cases import tiny_model
from nemo_megacpp.proof.compare import FLOAT64, Rung, compare
from nemo_megacpp.proof.step import StepSpec, run_step
from nemo_megacpp.runtime.workers import WorkerPool

from .conftest import Reference


def _dense_tags(experts: Any) -> None:
    """What stock Megatron-Core 0.16.1 does with EP=1, whatever the expert-tensor-parallel size."""
    for parameter in experts.parameters():
        parameter.allreduce = True


def _swapped_norm(self: Any, y: Any) -> Any:
    """Swap the first two heads of every tensor-parallel rank but the first."""
    if self.tp_group.rank() > 0:
        first, second, rest = y.split([self.v_dim, self.v_dim, y.size(-1) - 2 * self.v_dim], -1)
        y = m2rnn.torch.cat([second, first, rest], -1)
    return _norm(self, y)


_norm = m2rnn.M2RNNMixer._norm

FAULTS: dict[str, tuple[str, Any]] = {
    "expert weights tagged as dense": (
        "nemo_megacpp.mixers.experts.tag_expert_weights",
        _dense_tags,
    ),
    "gradient of replicated rows not summed": (
        "nemo_megacpp.mixers.linear.mark_replicated",
        lambda parameter, config: None,
    ),
    "zigzag not undone": (
        "nemo_megacpp.mixers.m2rnn.sequence_to_heads",
        lambda x, cp_group, order: _all_to_all_cp2hp(x, cp_group),
    ),
    "two heads swapped": ("nemo_megacpp.mixers.m2rnn.M2RNNMixer._norm", _swapped_norm),
}


def _run_broken(fault: str, spec: StepSpec, layout: ParallelLayout, weights: str) -> Any:
    target, replacement = FAULTS[fault]
    with mock.patch(target, replacement):
        return run_step(spec, layout, weights)


@pytest.mark.parametrize(
    ("fault", "pattern", "layout", "rung", "where"),
    [
        ("expert weights tagged as dense", "E", "tp=2,etp=1", "gradients", "mlp.experts"),
        ("gradient of replicated rows not summed", "R", "tp=2", "gradients", "shared_weight"),
        ("zigzag not undone", "R", "cp=2", "forward", ""),
        ("two heads swapped", "R", "tp=2", "forward", ""),
    ],
)
def test_fault_is_named(
    ranks: WorkerPool,
    reference: Reference,
    fault: str,
    pattern: str,
    layout: str,
    rung: str,
    where: str,
) -> None:
    spec = StepSpec(tiny_model(pattern), objective="logits", dtype="float64")
    weights, expected = reference(spec)
    place = ParallelLayout.parse(layout)
    result = ranks.run(place.world, _run_broken, fault, spec, place, weights)[0]
    broken: list[Rung] = [r for r in compare(expected, result, FLOAT64) if not r.holds]
    assert broken, f"{fault}: not seen"
    assert broken[0].name == rung
    assert where in broken[0].where


def test_starved_experts(ranks: WorkerPool, reference: Reference) -> None:
    """Experts, and a whole expert-parallel rank, that no token reaches."""
    spec = StepSpec(
        tiny_model("AEMR"), objective="logits", dtype="float64", starved_experts=(0, 1, 5)
    )
    weights, expected = reference(spec)
    dead = [
        key
        for key, value in expected.gradients.values.items()
        if "experts.experts" in key and not value[[0, 1, 5]].any() and value[[2, 3, 4, 6, 7]].any()
    ]
    assert dead, "the starved experts' gradients must be zero, the others' not"
    for text in ("ep=4", "tp=2,etp=1", "tp=2,ep=2,etp=2", "ep=2,pp=2"):
        layout = ParallelLayout.parse(text)
        result = ranks.run(layout.world, run_step, spec, layout, weights)[0]
        assert all(rung.holds for rung in compare(expected, result, FLOAT64)), text


def test_bound_state_gradient_binds_alike(ranks: WorkerPool, reference: Reference) -> None:
    """With a bound low enough to act everywhere, the R block's gradients still do not depend on
    how many ranks share the batch or the sequence."""
    spec = StepSpec(
        tiny_model("R", m2rnn_state_gradient_clip=1e-6), objective="logits", dtype="float64"
    )
    free = StepSpec(
        tiny_model("R", m2rnn_state_gradient_clip=None), objective="logits", dtype="float64"
    )
    weights, expected = reference(spec)
    _, unbound = reference(free)
    assert not all(rung.holds for rung in compare(unbound, expected, FLOAT64))
    for text in ("cp=2", "cp=4", "tp=2,cp=2", "world=2", "world=4", "world=4,tp=2"):
        layout = ParallelLayout.parse(text)
        result = ranks.run(layout.world, run_step, spec, layout, weights)[0]
        assert all(rung.holds for rung in compare(expected, result, FLOAT64)), text
