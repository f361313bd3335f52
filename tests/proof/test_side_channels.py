"""Side channels give the same numbers in every layout, and the proof sees one that does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.side_channels import ReplicatedTable, _replicated
from nemo_megacpp.proof.checks import FLOAT32, FLOAT64, Check, Limits, compare
from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from nemo_megacpp.specs.stack import HybridStack
from tests.path import run_step
from tests.reference import Reference
from tests.selection import slow_if

CHANNELS: list[dict[str, Any]] = [
    {"name": "language", "vocab_size": 5, "field": "lang"},
    {"name": "bigram", "vocab_size": 24, "ngram": 2, "partition": "vocabulary"},
    {
        **{"name": "kind", "vocab_size": 7, "field": "kind", "owner": [1, 3]},
        **{"combine": "concat", "width": 10},
    },
    {
        **{"name": "trigram", "vocab_size": 28, "ngram": 3, "owner": [2]},
        **{"partition": "vocabulary", "combine": "concat", "width": 6},
    },
    {"name": "deep", "vocab_size": 3, "field": "deep", "owner": "all"},
]
"""Every owner, partition and combination; layers of both stages at PP=2."""

DENSE, EXPERTS = (
    tiny_model("AMRA", side_channels=CHANNELS),
    tiny_model("AEMR", side_channels=CHANNELS),
)


def _checks(
    ranks: WorkerPool, reference: Reference, spec: StepSpec, text: str, within: Limits
) -> list[Check]:
    layout = ParallelLayout.parse(text)
    weights, expected = reference(spec)
    result = ranks.run(layout.world, run_step, spec, layout, weights)[0]
    return [check for check in compare(expected, result, within) if not check.passed]


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(model, layout, id=layout, marks=slow_if(not fast))
        for model, layout, fast in (
            (DENSE, "tp=2,pp=2", True),
            (DENSE, "tp=2", False),
            (DENSE, "tp=2,sp=false", False),
            (DENSE, "tp=4", False),
            (DENSE, "cp=2", False),
            (DENSE, "cp=4", False),
            (DENSE, "tp=2,cp=2", False),
            (DENSE, "world=2", False),
            (DENSE, "pp=2", False),
            (DENSE, "pp=4", False),
            (DENSE, "pp=2,vpp=2", False),
            (DENSE, "tp=2,pp=2,vpp=2", False),
            (DENSE, "tp=2,sp=false,pp=2", False),
            (EXPERTS, "tp=2,ep=2,etp=1", False),
            (EXPERTS, "cp=2,ep=2,pp=2", False),
        )
    ],
)
def test_float64(
    ranks: WorkerPool, reference: Reference, model: dict[str, Any], layout: str
) -> None:
    spec = StepSpec(model, objective="logits", dtype="float64")
    assert not _checks(ranks, reference, spec, layout, FLOAT64)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp=2,cp=2", "tp=2,pp=2", "world=2"])
@pytest.mark.parametrize("changes", [{}, {"use_distributed_optimizer": True}], ids=["", "sharded"])
def test_float32_loss(
    ranks: WorkerPool, reference: Reference, layout: str, changes: dict[str, Any]
) -> None:
    assert not _checks(ranks, reference, StepSpec(DENSE, **changes), layout, FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp=2", "cp=2", "tp=2,cp=2", "cp=2,pp=2", "pp=4"])
def test_packs(ranks: WorkerPool, reference: Reference, layout: str) -> None:
    model = {**DENSE, "mode": "mamba3", "seq_length": 32}
    documents = (12, 4, 16)
    spec = StepSpec(model, objective="logits", dtype="float64", documents=documents)
    assert not _checks(ranks, reference, spec, layout, FLOAT64)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp=2,pp=2", "pp=2,vpp=2"])
def test_recompute(ranks: WorkerPool, reference: Reference, layout: str) -> None:
    """A recomputed layer reads its ids again, while other microbatches have passed."""
    fields = {"recompute_granularity": "full", "recompute_method": "uniform"}
    model = {**DENSE, **fields, "recompute_num_layers": 1}
    spec = StepSpec(model, objective="logits", dtype="float64")
    _, whole = reference(StepSpec(DENSE, objective="logits", dtype="float64"))
    _, same = reference(spec)
    assert not [check for check in compare(whole, same, FLOAT64) if not check.passed]
    assert not _checks(ranks, reference, spec, layout, FLOAT64)


# -- faults ----------------------------------------------------------------------------------------


def _owner_moved(self: HybridStack, ids: Mapping[str, torch.Tensor], *args: Any) -> torch.Tensor:
    """Apply the channels of a stage one layer early: by their place in the stage, not the model."""
    moved = {str(int(name) - 1): module for name, module in self.side_channels.items()}
    with mock.patch.dict(self._modules, {"side_channels": torch.nn.ModuleDict(moved)}):
        return _run_layers(self, ids, *args)


_run_layers = HybridStack._run_layers


def _whole_row(self: ReplicatedTable, ids: torch.Tensor) -> torch.Tensor:
    """Look up the first rank's tokens on every rank."""
    ids = ids.t()
    if self.config.sequence_parallel:
        ids = ids.chunk(self.tp_group.size())[0]
    return torch.nn.functional.embedding(ids, self.weight)


def _untagged(*args: Any) -> torch.nn.Parameter:
    parameter = _replicated(*args)
    parameter.sequence_parallel = False  # type: ignore[attr-defined]
    return parameter


FAULTS: dict[str, tuple[str, Any]] = {
    "owner moved": ("nemo_megacpp.specs.stack.HybridStack._run_layers", _owner_moved),
    "gradient not summed": ("nemo_megacpp.mixers.side_channels._replicated", _untagged),
    "another rank's tokens": (
        "nemo_megacpp.mixers.side_channels.ReplicatedTable.forward",
        _whole_row,
    ),
}


def _run_broken(fault: str, spec: StepSpec, layout: ParallelLayout, weights: GlobalValues) -> Any:
    with mock.patch(*FAULTS[fault]):
        return run_step(spec, layout, weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "layout", "check", "where"),
    [
        ("owner moved", "pp=2", "forward", ""),
        ("gradient not summed", "tp=2", "gradients", "side_channels"),
        ("another rank's tokens", "tp=2", "forward", ""),
    ],
)
def test_fault_is_named(
    ranks: WorkerPool, reference: Reference, fault: str, layout: str, check: str, where: str
) -> None:
    spec = StepSpec(DENSE, objective="logits", dtype="float64")
    weights, expected = reference(spec)
    place = ParallelLayout.parse(layout)
    result = ranks.run(place.world, _run_broken, fault, spec, place, weights)[0]
    broken = [found for found in compare(expected, result, FLOAT64) if not found.passed]
    assert broken, f"{fault}: not seen"
    assert broken[0].name == check
    assert where in broken[0].where
