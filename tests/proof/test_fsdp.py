"""Megatron's FSDP: one rank and TP=2 x FSDP=2 give the same loss, gradients, norm and steps.

Against Megatron's ``DistributedDataParallel`` on one rank, on Megatron-Core 0.19.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from nemo_megacpp.core.fsdp import STRATEGIES, problem_with_fsdp
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.checks import FLOAT32, SEEDS, compare, rounding_limits
from nemo_megacpp.proof.core_run import run_step
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from tests.reference import Reference

pytestmark = pytest.mark.skipif(
    problem_with_fsdp() is not None, reason=f"FSDP: {problem_with_fsdp()}"
)
_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["mamba", "m2rnn", "moe"]}
_TIED = {"share_embeddings_and_output_weights": True}
_PER_TOKEN = {"calculate_per_token_loss": True, "m2rnn_state_gradient_clip": None}
_OVERLAP = {"moe_shared_expert_overlap": True}
_DEPTH = {"m2rnn_depth_state": True}
_CHANNELS = {
    "side_channels": [
        {"name": "language", "vocab_size": 5, "field": "lang"},
        {"name": "bigram", "vocab_size": 24, "ngram": 2, "partition": "vocabulary"},
        {"name": "deep", "vocab_size": 3, "field": "deep", "owner": "all"},
    ]
}
_slow = pytest.mark.slow
_ALL = StepSpec(tiny_model("AEMRF"), steps=3, global_batch_size=8)
_M3 = tiny_model("MR", mode="mamba3")


_OFF = {"overlap_grad_reduce": False, "overlap_param_gather": False}


def _sharded(spec: StepSpec, strategy: str, **ddp: Any) -> StepSpec:
    asked = {"use_megatron_fsdp": True, "data_parallel_sharding_strategy": strategy, **ddp}
    return dataclasses.replace(spec, ddp={**spec.ddp, **asked})


def _hold(
    ranks: Any, reference: Reference, spec: StepSpec, text: str, strategy: str, **ddp: Any
) -> None:
    layout = ParallelLayout.parse(text)
    weights, expected = reference(spec)
    sharded = _sharded(spec, strategy, **ddp)
    result = ranks.run(layout.world, run_step, sharded, layout, weights)[0]
    broken = [check for check in compare(expected, result, FLOAT32) if not check.passed]
    assert not broken, broken


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy(ranks: Any, reference: Reference, strategy: str) -> None:
    """All families, three steps of Adam with clipping over two microbatches each, in float32 (the
    buffers of Megatron's FSDP know no float64): 1e-5."""
    _hold(ranks, reference, _ALL, "tp=2,world=4", strategy)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(_M3, "tp=2,world=4", id="mamba3"),
        pytest.param(tiny_model("AMR"), "tp=2,sp=false,world=4", id="without-sp"),
        pytest.param(tiny_model("EA"), "ep=2,world=4", id="ep"),
        pytest.param(tiny_model("EA"), "tp=2,etp=1,world=4", id="etp"),
        pytest.param(tiny_model("AMRE"), "cp=2,world=4", id="cp"),
        pytest.param(tiny_model("AMR", **_TIED), "tp=2,world=4", id="tied"),
        pytest.param(tiny_model("AEMR", **_FULL), "tp=2,world=4", id="full", marks=_slow),
        pytest.param(tiny_model("AEMR", **_SELECTIVE), "tp=2,world=4", id="part", marks=_slow),
        pytest.param(tiny_model("AEMR", **_PER_TOKEN), "tp=2,world=4", id="token", marks=_slow),
        pytest.param(tiny_model("EM", **_OVERLAP), "tp=2,world=4", id="shared", marks=_slow),
        pytest.param(tiny_model("MRMR", **_DEPTH), "tp=2,world=4", id="depth", marks=_slow),
        pytest.param(tiny_model("AEMR", **_CHANNELS), "tp=2,world=4", id="channels", marks=_slow),
    ],
)
def test_every_layout(ranks: Any, reference: Reference, model: dict[str, Any], layout: str) -> None:
    """Parameters, gradients and optimizer sharded; two steps over two microbatches each: 1e-5."""
    spec = StepSpec(model, steps=2, global_batch_size=8)
    _hold(ranks, reference, spec, layout, "optim_grads_params")


@pytest.mark.parametrize(
    ("strategy", "ddp"),
    [("optim", _OFF), ("optim_grads", {"overlap_param_gather": False, "bucket_size": 1000})],
)
def test_without_overlap(
    ranks: Any, reference: Reference, strategy: str, ddp: dict[str, Any]
) -> None:
    _hold(ranks, reference, _ALL, "tp=2,world=4", strategy, **ddp)


def test_packed_documents(ranks: Any, reference: Reference) -> None:
    spec = StepSpec(
        tiny_model("AMR", mode="mamba3", seq_length=32),
        steps=2,
        global_batch_size=8,
        documents=(16, 4, 12),
    )
    _hold(ranks, reference, spec, "tp=2,world=4", "optim_grads_params")


def test_bf16(ranks: Any, reference: Reference) -> None:
    """Within what rounding to bfloat16 moves on one rank; the norm of gradients that are summed in
    float32, and the float32 parameters that the optimizer steps."""
    spec = StepSpec(tiny_model("AMR"), dtype="bfloat16", global_batch_size=4)
    layout, one = ParallelLayout.parse("tp=2,world=4"), ParallelLayout()
    weights, expected = reference(spec)
    moved = [ranks.run(1, run_step, spec, one, weights, False, seed)[0] for seed in SEEDS]
    sharded = _sharded(spec, "optim_grads_params", megatron_fsdp_main_grads_dtype=torch.float32)
    result = ranks.run(layout.world, run_step, sharded, layout, weights)[0]
    within = rounding_limits(expected, moved)
    broken = [check for check in compare(expected, result, within) if not check.passed]
    assert not broken, broken
