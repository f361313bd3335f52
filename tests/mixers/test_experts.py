"""Expert weights: which groups sum their gradients, and who counts them in the gradient norm; and
the router's counts, which move the expert bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.experts import CapacityRouter, tag_expert_weights
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import prepare, save_initial_weights
from tests.checkpoint.te_backend import TransformerEngineNames
from tests.training_steps import OVERLAPS, Trained, train


class _Grouped(torch.nn.Module):
    """The parameters of ``TEGroupedMLP``, one local expert with a bias."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("linear_fc1", "linear_fc2"):
            linear: Any = torch.nn.Module()
            linear.weight0 = torch.nn.Parameter(torch.zeros(2, 2))
            linear.bias0 = torch.nn.Parameter(torch.zeros(2))
            self.add_module(name, linear)


def test_tags_of_untagged_weights() -> None:
    experts = _Grouped()
    tag_expert_weights(experts)
    tags = {
        name: (p.allreduce, p.tensor_model_parallel, p.partition_dim, p.partition_stride)
        for name, p in experts.named_parameters()
    }
    assert tags == {
        "linear_fc1.weight0": (False, True, 0, 1),
        "linear_fc1.bias0": (False, True, 0, 1),
        "linear_fc2.weight0": (False, True, 1, 1),
        "linear_fc2.bias0": (False, True, 0, 1),
    }


def test_tags_that_are_there_stay() -> None:
    experts: Any = _Grouped()
    experts.linear_fc1.weight0.tensor_model_parallel = True
    experts.linear_fc1.weight0.partition_dim = 7
    tag_expert_weights(experts)
    assert experts.linear_fc1.weight0.partition_dim == 7


@pytest.fixture(scope="module")
def on_one_rank(ranks: WorkerPool, tmp_path_factory: Any) -> tuple[StepSpec, str, Trained]:
    """Return a spec, its weights, and a step of one rank with experts one by one."""
    spec, folder = StepSpec(tiny_model("AE")), str(tmp_path_factory.mktemp("weights"))
    ranks.run(1, save_initial_weights, spec, ParallelLayout(), folder)
    return spec, folder, ranks.run(1, train, spec, ParallelLayout(), folder, {}, 1)[0]


@pytest.mark.parametrize(
    ("layout", "ddp"),
    [
        ("tp=2,ep=2,etp=1", {}),
        ("tp=2,ep=2,etp=1", OVERLAPS),
        ("tp=2,etp=1", {}),
        ("tp=2,etp=2", {}),
        ("tp=2,ep=2,etp=2", {}),
    ],
    ids=["ep", "ep-distributed-optimizer", "etp1", "etp2", "ep-etp2"],
)
def test_the_gradient_norm_counts_grouped_experts(
    ranks: WorkerPool, on_one_rank: tuple[StepSpec, str, Trained], layout: str, ddp: dict[str, Any]
) -> None:
    """Grouped experts whose weights come without tags, on every rank of the layout."""
    spec, weights, expected = on_one_rank
    where = ParallelLayout.parse(layout)
    task = (spec, where, weights, ddp, 1, TransformerEngineNames())
    result: Trained = ranks.run(where.world, train, *task)[0]
    assert result.losses == pytest.approx(expected.losses, rel=1e-6)
    assert result.norms == pytest.approx(expected.norms, rel=1e-5)


TOKENS = 301  # bfloat16 has no 301


def _count() -> tuple[str, list[float]]:
    model = tiny_model("E", num_moe_experts=2, moe_router_topk=2, seq_length=TOKENS)
    trainee = prepare(StepSpec(model, dtype="bfloat16"), ParallelLayout())
    tokens = torch.arange(TOKENS)[None] % 100
    trainee.wrapped[0](tokens, torch.arange(TOKENS)[None], None)
    (router,) = (m for m in trainee.chunks[0].modules() if isinstance(m, CapacityRouter))
    counts = router.local_tokens_per_expert
    return str(counts.dtype), counts.tolist()


def test_tokens_are_counted_exactly_in_a_bfloat16_model(ranks: WorkerPool) -> None:
    assert ranks.run(1, _count)[0] == ("torch.float32", [TOKENS, TOKENS])
