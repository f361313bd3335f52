"""F blocks: Megatron's own MLP layer, and its recompute behind a frozen embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.mamba import MambaModel
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch.nn import functional as F

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from nemo_megacpp.specs.backend import TorchBackend
from nemo_megacpp.specs.stack_spec import build_hybrid_stack_spec
from tests.bare import make_config, microbatches, prepare

BIASED = {"gated_linear_unit": False, "activation_func": F.gelu, "add_bias_linear": True}


def _stock_spec(config: HybridConfig) -> ModuleSpec:
    """Return Megatron's ``mamba_stack_spec`` with the torch backend's modules: those of this
    package for other layers than ``-``, which is as Megatron has it."""
    backend = TorchBackend()
    ours = build_hybrid_stack_spec(config, backend).submodules.layers
    mlp_layer = ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=backend.column_parallel_layer_norm_linear(),
                    linear_fc2=backend.row_parallel_linear(),
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return ModuleSpec(
        module=MambaStack,
        params={"post_layer_norm": False},  # its class is Transformer Engine's
        submodules=MambaStackSubmodules(
            mamba_layer=ours["M"],
            attention_layer=ours["A"],
            mlp_layer=mlp_layer,
            moe_layer=ours["E"],
        ),
    )


def _differing(pattern: str, changes: dict[str, Any], layout: ParallelLayout) -> list[str]:
    """On a rank: build the model on our stack and on Megatron's with the same weights; return where
    names, losses or gradients differ in a bit."""
    spec = StepSpec(tiny_model(pattern, **changes))
    start_model_parallel(layout, spec.seed)
    config = make_config(spec, layout)
    own = build_hybrid_stack_spec(config, TorchBackend())
    own.submodules.final_norm = IdentityOp
    models: list[Any] = [
        MambaModel(
            config,
            mamba_stack_spec=stack,
            vocab_size=128,
            max_sequence_length=config.seq_length,
            hybrid_override_pattern=config.pattern.to_megatron("hybrid_override_pattern"),
        )
        for stack in (own, _stock_spec(config))
    ]
    models[1].load_state_dict(models[0].state_dict())
    batch = next(microbatches(spec))
    found = []
    for model in models:
        loss = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).sum()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append({"loss": loss.detach(), **gradients})
    ours, stock = found
    assert ours.keys() == stock.keys() and all(value.any() for value in stock.values())
    return [name for name in stock if not torch.equal(ours[name], stock[name])]


@pytest.mark.parametrize(
    ("pattern", "changes", "layout"),
    [
        ("FAMFEF", {}, "tp=1"),
        pytest.param("AFMF", BIASED, "tp=2", marks=pytest.mark.slow),
    ],
)
def test_the_stock_stack_computes_the_same(
    ranks: WorkerPool, pattern: str, changes: dict[str, Any], layout: str
) -> None:
    """Loss and every gradient, bit by bit."""
    where = ParallelLayout.parse(layout)
    assert ranks.run(where.world, _differing, pattern, changes, where) == [[]] * where.world


def _gradients(form: dict[str, Any]) -> dict[str, bytes]:
    (chunk,) = prepare(StepSpec(tiny_model("FA", **form)), ParallelLayout()).chunks
    model: Any = chunk
    model.embedding.requires_grad_(False)
    tokens = torch.arange(16)[None]
    model(tokens, tokens, None, labels=tokens).sum().backward()
    named = model.decoder.named_parameters()
    return {name: p.main_grad.numpy().tobytes() for name, p in named if p.main_grad.any()}


def test_a_frozen_embedding_cuts_off_no_gradient(ranks: WorkerPool) -> None:
    """The recomputed region of the first layer takes the embedding's output itself."""
    form = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    (plain,), (again,) = ranks.run(1, _gradients, {}), ranks.run(1, _gradients, form)
    assert plain == again
    assert {"layers.0.mlp.linear_fc1.layer_norm_weight", "layers.0.mlp.linear_fc2.weight"} <= set(
        again
    )
