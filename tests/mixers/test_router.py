"""The router's counts, which move the expert bias."""

from __future__ import annotations

import torch

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.router import CapacityRouter
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import prepare

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
