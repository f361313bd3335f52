"""Model FLOPs of a step: equal in every layout, and to what NeMo and Megatron count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from nemo.utils.flops_formulas import (
    _mamba_layer_flops,
    _nemotronh_mlp_layer_flops,
    _non_mla_attn_layer_flops,
    moe_mlp_flops_calculator,
)

from nemo_megacpp.contract.stages import build_stages
from nemo_megacpp.contract.work import step_operations
from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.pattern import Family
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.recipes.catalog import CATALOG, NAM56R_MODEL


def _operations(job: Job, tokens: int) -> int:
    config = job.config()
    return sum(step_operations(config, stage.chunks, tokens) for stage in build_stages(job))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "layout", ["tp=2,cp=2,ep=4,etp=1,pp=2", "tp=2,ep=2,etp=2,pp=2,vpp=2", "ep=2,pp=4", "cp=2"]
)
def test_a_layout_changes_no_model_flops(layout: str, tied: bool) -> None:
    model = tiny_model("AEMRAEMR", share_embeddings_and_output_weights=tied)
    whole = _operations(Job(model), 1024)
    assert _operations(Job(model, ParallelLayout.parse(layout)), 1024) == whole > 0


def _layer(letter: str, **changes: Any) -> tuple[int, Job]:
    """Operations of a layer of NAM56R in a step of one row: what two layers have beyond one."""
    rows = {}
    for depth in (1, 2):
        model = {**NAM56R_MODEL, "hybrid_pattern": letter * depth, "num_layers": depth, **changes}
        rows[depth] = _operations(Job(model), NAM56R_MODEL["seq_length"])
    return rows[2] - rows[1], Job(model)


def test_attention_counts_as_in_nemo_and_megatron() -> None:
    """With a causal mask: half of the scores."""
    model = NAM56R_MODEL
    s, h, heads, groups = (
        model[name]
        for name in ("seq_length", "hidden_size", "num_attention_heads", "num_query_groups")
    )
    ours, _ = _layer("A")
    nemo = SimpleNamespace(gbs=1, enc_seq_len=s, hs=h, query_groups=groups, attention_heads=heads)
    assert ours == _non_mla_attn_layer_flops(nemo)  # type: ignore[arg-type]
    # Megatron-LM core_v0.16.1, attn_layer_flops in megatron/training/training.py.
    assert ours == 3 * 4 * s * h * (h + h * groups / heads + s / 2)


def test_experts_count_as_in_nemo_and_megatron() -> None:
    """The share of the experts that a token is sent to, the shared expert, and our router."""
    model = NAM56R_MODEL
    s, h, width, topk, shared = (
        model[name]
        for name in (
            *("seq_length", "hidden_size", "moe_ffn_hidden_size", "moe_router_topk"),
            "moe_shared_expert_intermediate_size",
        )
    )
    ours, job = _layer("E")
    gated = job.config().gated_linear_unit
    # Megatron-LM core_v0.16.1, moe_layer_flops.
    megatron = 3 * 4 * s * h * (width * topk + shared) * (1.5 if gated else 1.0)
    router = 3 * 2 * s * h * model["num_moe_experts"]
    assert ours == megatron + router
    nemo = moe_mlp_flops_calculator(s, h, width, topk, gated)
    assert megatron - 3 * 4 * s * h * shared * (1.5 if gated else 1.0) == nemo


def test_an_mlp_counts_as_in_nemo_and_megatron() -> None:
    s, h, width = (NAM56R_MODEL[name] for name in ("seq_length", "hidden_size", "ffn_hidden_size"))
    ours, _ = _layer("F")
    nemo = SimpleNamespace(gbs=1, enc_seq_len=s, hs=h, ffn_hs=width)
    assert ours == _nemotronh_mlp_layer_flops(nemo)  # type: ignore[arg-type]
    # Megatron-LM core_v0.16.1, mlp_layer_flops.
    assert ours == 3 * 4 * s * h * width * 1.5


def test_mamba_has_the_projections_of_nemo_and_its_own_scan() -> None:
    model = NAM56R_MODEL
    s, h, state, groups, heads, width = (
        model[name]
        for name in (
            *("seq_length", "hidden_size", "mamba_state_dim", "mamba_num_groups"),
            *("mamba_num_heads", "mamba_head_dim"),
        )
    )
    ours, job = _layer("M")
    nemo = SimpleNamespace(
        gbs=1, enc_seq_len=s, hs=h, mamba_state_dim=state, mamba_head_dim=width,
        mamba_num_groups=groups, mamba_num_heads=heads,
    )  # fmt: skip
    inner = heads * width
    projections = _mamba_layer_flops(nemo) - 3 * 2 * s * inner * state  # type: ignore[arg-type]
    convolution = 3 * 2 * s * (inner + 2 * groups * state) * 4
    scan = 3 * s * block_of(Family.MAMBA).mixing(Sizes(job))
    assert ours == projections + convolution + scan


def test_a_head_is_two_operations_per_weight() -> None:
    recipe = CATALOG["nam56r"].model
    model = {**recipe, "hybrid_pattern": "A", "num_layers": 1}
    layer, _ = _layer("A")
    head = 3 * 2 * recipe["hidden_size"] * recipe["vocab_size"] * recipe["seq_length"]
    assert _operations(Job(model), recipe["seq_length"]) == layer + head
