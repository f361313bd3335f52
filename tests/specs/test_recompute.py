"""Activations that are computed again in the backward pass give the same step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.checks import FLOAT64, compare
from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_result import StepResult
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import prepare
from tests.path import run_step

SELECTIVE = {"recompute_granularity": "selective"}
FULL = {"recompute_granularity": "full"}
FORMS: tuple[dict[str, Any], ...] = (
    {**FULL, "recompute_method": "uniform", "recompute_num_layers": 1},
    {**FULL, "recompute_method": "uniform", "recompute_num_layers": 3},
    {**FULL, "recompute_method": "block", "recompute_num_layers": 2},
    {**SELECTIVE, "recompute_modules": ["core_attn", "moe", "mamba", "m2rnn", "mlp"]},
)
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.1}
COUNTED = {"moe_router_load_balancing_type": "aux_loss", "moe_z_loss_coeff": 1e-3}
EVERY_KIND = ("layernorm", "core_attn", "shared_experts", "moe")


def _spec(*modules: str) -> StepSpec:
    again: dict[str, Any] = {**SELECTIVE, "recompute_modules": list(modules)}
    model = tiny_model("AE", **(again if modules else {}))
    return StepSpec(model, objective="logits", dtype="float64", global_batch_size=2)


def _step(
    spec: StepSpec, layout: ParallelLayout, weights: GlobalValues | None = None
) -> tuple[StepResult | None, int]:
    """Return a step, and how often the norm before the experts ran in it."""
    from nemo_megacpp.mixers.norm import TorchRMSNorm

    runs = [0]
    stock = TorchRMSNorm.forward

    def counted(self: TorchRMSNorm, x: Any) -> Any:
        runs[0] += 1
        return stock(self, x)

    TorchRMSNorm.forward = counted  # type: ignore[method-assign]
    return run_step(spec, layout, weights), runs[0]


@pytest.fixture(scope="module")
def plain(ranks: WorkerPool) -> tuple[StepResult, int]:
    """Return a step on one rank without recomputation, and its count of norms."""
    return ranks.run(1, _step, _spec(), ParallelLayout())[0]


@pytest.mark.parametrize(
    ("modules", "layout"),
    [
        (("layernorm",), "tp=1"),
        (("layernorm",), "tp=2,cp=2,etp=1"),
        (EVERY_KIND, "tp=2,ep=2,etp=1"),
    ],
    ids=["layernorm", "layernorm-tp-cp", "all-tp-ep"],
)
def test_recomputed_modules_give_the_same_step(
    ranks: WorkerPool, plain: tuple[StepResult, int], modules: tuple[str, ...], layout: str
) -> None:
    expected, norms = plain
    where = ParallelLayout.parse(layout)
    result, norms_again = ranks.run(where.world, _step, _spec(*modules), where, expected.initial)[0]
    broken = [check for check in compare(expected, result, FLOAT64) if not check.passed]
    assert not broken, broken
    # Of two norms a microbatch, the one before the experts runs twice.
    assert norms_again == norms * 3 // 2


def _bits(spec: StepSpec, layout: ParallelLayout) -> dict[str, Any]:
    """Return everything that a step computes on this rank, as bytes."""
    parallel_state.destroy_model_parallel()
    trainee = prepare(spec, layout)
    seed = spec.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    clear_aux_losses_tracker()
    found: dict[str, Any] = {}
    finalize: Any = trainee.config.finalize_model_grads_func

    def note_routes(*args: Any, **kwargs: Any) -> None:
        """What moves the expert bias, before it is reduced and set to zero."""
        for number, chunk in enumerate(trainee.chunks):
            for name, buffer in chunk.named_buffers():
                if name.endswith("local_tokens_per_expert"):
                    found[f"{number}.{name}"] = buffer.tolist()
        finalize(*args, **kwargs)

    trainee.config.finalize_model_grads_func = note_routes
    losses = trainee.forward_backward()
    found["losses"] = [(float(total), int(count)) for total, count in losses]
    for name, entry in get_moe_layer_wise_logging_tracker().items():
        found[name] = entry["values"].tolist()
    for number, chunk in enumerate(trainee.wrapped):
        for name, parameter in chunk.named_parameters():
            found[f"{number}.{name}"] = parameter.main_grad.double().numpy().tobytes()
    found["generator"] = torch.get_rng_state().numpy().tobytes()
    return found


def _differing(
    spec: StepSpec, layout: ParallelLayout, forms: tuple[dict[str, Any], ...]
) -> list[list[str]]:
    """Return for each form of recompute what differs from a step that saves everything."""
    plain = _bits(spec, layout)
    found = []
    for form in forms:
        again = _bits(replace(spec, model={**spec.model, **form}), layout)
        assert again.keys() == plain.keys()
        found.append([name for name, bits in plain.items() if again[name] != bits])
    return found


@pytest.mark.parametrize(
    ("model", "layout", "documents", "forms"),
    [
        pytest.param(tiny_model("AEMRAF"), "tp=1", (), FORMS, id="one-rank"),
        pytest.param(
            tiny_model("AEMRF", mode="mamba3", seq_length=32),
            "tp=2,cp=2,ep=2,etp=1",
            (16, 4, 12),
            FORMS[1::2],
            id="packs-together",
        ),
        pytest.param(
            tiny_model("AE|MFA|EMR|FE"),
            "pp=2,vpp=2",
            (),
            FORMS[1:3],
            id="virtual-stages",
        ),
    ],
)
def test_recompute_changes_no_bit(
    ranks: WorkerPool,
    model: dict[str, Any],
    layout: str,
    documents: tuple[int, ...],
    forms: tuple[dict[str, Any], ...],
) -> None:
    """Losses, auxiliary losses and routed tokens (each counted once) and every gradient, with
    dropout on."""
    where = ParallelLayout.parse(layout)
    spec = StepSpec({**model, **DROPOUT, **COUNTED}, documents=documents)
    for rank in ranks.run(where.world, _differing, spec, where, forms):
        assert rank == [[] for _ in forms]


def _kept_layers(form: dict[str, Any]) -> tuple[float, list[str], int]:
    """Return the largest gradient of a one-stage model with a frozen embedding, the parameters
    without one, and how often the first norm of the model ran."""
    (chunk,) = prepare(StepSpec(tiny_model("AMR", **form)), ParallelLayout()).chunks
    model: Any = chunk
    model.embedding.requires_grad_(False)
    runs: list[int] = []
    model.decoder.layers[0].register_forward_hook(lambda *_: runs.append(1))
    tokens = torch.arange(16)[None]
    model(tokens, tokens, None, labels=tokens).sum().backward()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in named.items() if not p.main_grad.any()]
    return max(float(p.main_grad.abs().max()) for p in named.values()), missing, len(runs)


@pytest.mark.parametrize("form", FORMS[::2])
def test_a_frozen_embedding_cuts_off_no_gradient(ranks: WorkerPool, form: dict[str, Any]) -> None:
    ((largest, missing, runs),) = ranks.run(1, _kept_layers, form)
    assert largest > 0 and not missing and runs == 2
