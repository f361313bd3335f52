"""Parameters that are gathered while the model runs: whoever reads one waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.checks import tensor_difference
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import save_initial_weights
from tests.training_steps import OVERLAPS, Trained, train

NATIVE = tiny_model("MEAR")
MAMBA3 = tiny_model(
    "AEMR",
    mode="mamba3",
    share_embeddings_and_output_weights=True,
    moe_shared_expert_gate=True,
    moe_shared_expert_overlap=True,
)

CHANNELS = tiny_model(
    "AR",
    side_channels=[
        {"name": "a", "vocab_size": 5, "field": "a"},
        {"name": "b", "vocab_size": 6, "field": "b", "owner": "all", "combine": "concat"},
        {"name": "c", "vocab_size": 8, "ngram": 2, "owner": [1], "partition": "vocabulary"},
    ],
)


@pytest.fixture(scope="module")
def on_one_rank(
    ranks: WorkerPool, tmp_path_factory: Any
) -> Callable[[StepSpec], tuple[str, Trained]]:
    """Return a function from a spec to its weights and three steps on one rank, cached."""
    known: dict[str, tuple[str, Trained]] = {}

    def of(spec: StepSpec) -> tuple[str, Trained]:
        if repr(spec) not in known:
            folder, one = str(tmp_path_factory.mktemp("weights")), ParallelLayout()
            ranks.run(1, save_initial_weights, spec, one, folder)
            known[repr(spec)] = folder, ranks.run(1, train, spec, one, folder, {})[0]
        return known[repr(spec)]

    return of


@pytest.mark.parametrize(
    ("model", "layout", "aligned"),
    [
        pytest.param(NATIVE, "world=2", False, id="nemo_native-dp"),
        pytest.param(NATIVE, "cp=2", False, id="nemo_native-cp"),
        pytest.param(NATIVE, "pp=2,vpp=2,world=4", True, id="nemo_native-vpp-aligned"),
        pytest.param(MAMBA3, "world=2", False, id="mamba3-tied-gate"),
        pytest.param(CHANNELS, "world=2", False, id="side-channels", marks=pytest.mark.slow),
    ],
)
def test_three_steps_with_both_overlaps_are_those_of_one_rank(
    ranks: WorkerPool,
    on_one_rank: Callable[[StepSpec], tuple[str, Trained]],
    model: dict[str, Any],
    layout: str,
    aligned: bool,
) -> None:
    """Every tensor in a bucket of its own, which arrives no sooner than somebody waits for it."""
    spec, where = StepSpec(model, learning_rate=1e-3), ParallelLayout.parse(layout)
    weights, expected = on_one_rank(spec)
    ddp = {**OVERLAPS, "align_param_gather": aligned}
    result: Trained = ranks.run(where.world, train, spec, where, weights, ddp)[0]
    assert result.losses == pytest.approx(expected.losses, rel=1e-6)
    assert result.norms == pytest.approx(expected.norms, rel=1e-5)
    wrong = {
        key: difference
        for key, value in expected.parameters.items()
        if not (difference := tensor_difference(value, result.parameters[key])) <= 1e-5
    }
    assert not wrong
