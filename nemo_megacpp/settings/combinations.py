"""Combinations of settings that are refused, as messages.

``config`` is the model's configuration in all functions: a ``HybridConfig``, or the plain one of a
Megatron script.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from torch.nn import functional as F

from nemo_megacpp.settings.fsdp import fsdp_violations


def range_violations(config: TransformerConfig) -> Iterator[str]:
    """Yield numbers outside their range."""
    for name in ("hidden_dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            yield (f"{name}: {getattr(config, name)} must be at least 0 and below 1.")
    for name in ("layernorm_epsilon", "softmax_scale", "moe_expert_capacity_factor"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            yield (f"{name}: {value} must be above 0.")
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(coefficients, list) != isinstance(kinds, list):
        yield (
            f"moe_router_load_balancing_type={kinds!r} and moe_aux_loss_coeff={coefficients!r} "
            f"must both be lists, of one length, or neither."
        )
    at_least_zero: dict[str, Any] = {
        "moe_aux_loss_coeff": coefficients,
        "moe_z_loss_coeff": config.moe_z_loss_coeff,
        "init_method_std": config.init_method_std,
    }
    for name, value in at_least_zero.items():
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not number >= 0:
                yield (f"{name}: {number} must be at least 0.")


def bias_violations(config: TransformerConfig, unbiased: list[str]) -> Iterator[str]:
    """Yield biases that only some blocks would have.

    Args:
        unbiased: letters of the pattern whose mixers have no biases.
    """
    if config.add_bias_linear and unbiased:
        yield (
            f"add_bias_linear=True: the projections of {' and '.join(unbiased)} have no biases, so "
            f"only some blocks of this pattern would have them. Leave add_bias_linear at False."
        )


_RECOMPUTED = {
    "A": ("core_attn",),
    "E": ("moe", "shared_experts", "moe_act", "layernorm"),
    "M": ("mamba",),
    "R": ("m2rnn",),
    "F": ("mlp",),
}
"""What the blocks of a family can recompute in the backward pass, beside the whole block."""

OWN_MODULES = ("mamba", "m2rnn")
"""Of these, the names that Megatron-Core 0.16 does not know."""


def with_modules_of(model: Mapping[str, Any], letters: Collection[str]) -> dict[str, Any]:
    """Return fields of a model with only those modules recomputed that blocks of ``letters`` have,
    for a model of a part of the families."""
    if model.get("recompute_granularity") != "selective" or not set(letters) <= set(_RECOMPUTED):
        return dict(model)
    can = {name for letter in letters for name in _RECOMPUTED[letter]}
    modules = [name for name in model.get("recompute_modules") or ["core_attn"] if name in can]
    if modules:
        return {**model, "recompute_modules": modules}
    return {name: value for name, value in model.items() if not name.startswith("recompute_")}


def recompute_violations(config: TransformerConfig, letters: Collection[str]) -> Iterator[str]:
    """Yield what is missing or pointless in the settings of recomputation, and modules to be
    recomputed that no block has.

    Args:
        letters: of the pattern; with a user's family among them no module is refused, as its
            modules are not known.
    """
    granularity, modules = config.recompute_granularity, config.recompute_modules
    if granularity == "full":
        yield from _full_recompute_violations(config)
    elif config.recompute_method is not None or config.recompute_num_layers is not None:
        yield (
            f"recompute_method={config.recompute_method!r}, recompute_num_layers="
            f"{config.recompute_num_layers} have no effect without recompute_granularity='full'."
        )
    if granularity != "selective" or not set(letters) <= set(_RECOMPUTED):
        return
    can = [name for letter in letters for name in _RECOMPUTED[letter]]
    if not config.moe_shared_expert_intermediate_size and "shared_experts" in can:
        can.remove("shared_experts")
    known = {"mla_up_proj", *(name for names in _RECOMPUTED.values() for name in names)}
    chosen = ["core_attn"] if modules is None else modules
    wrong = [name for name in chosen if name in known - set(can)]
    if wrong or modules == []:
        default = " (Megatron's default)" if modules is None else ""
        yield (
            f"recompute_modules={modules or wrong}{default}: "
            + (f"no block of this model recomputes {', '.join(wrong)}. " if wrong else "is empty. ")
            + f"It can recompute {', '.join(can)}."
        )


def _full_recompute_violations(config: TransformerConfig) -> Iterator[str]:
    """Yield what whole layers cannot be recomputed without, or with."""
    if config.recompute_method is None:
        yield (
            "recompute_granularity='full' needs recompute_method. Legal: 'uniform' (all layers, "
            "recompute_num_layers at a time), 'block' (the first recompute_num_layers of each "
            "pipeline chunk)."
        )
    count = config.recompute_num_layers
    if count is None or count < 1:
        yield (
            f"recompute_granularity='full' needs recompute_num_layers of at least 1; it is {count}."
        )
    if config.moe_layer_recompute:
        yield "moe_layer_recompute=True has no effect with recompute_granularity='full'."
    if config.recompute_modules not in (None, ["core_attn"]):  # what Megatron fills in
        yield (
            f"recompute_modules={config.recompute_modules!r} has no effect with "
            f"recompute_granularity='full', which recomputes whole layers."
        )


def ignored_violations(config: TransformerConfig, letters: Collection[str]) -> Iterator[str]:
    """Yield settings that Megatron would ignore because of another one, or fail on in the first
    step.

    Args:
        letters: of the pattern.
    """
    modules = config.recompute_modules
    if (
        config.recompute_granularity is None
        and not config.moe_layer_recompute
        and modules not in (None, ["core_attn"])  # what Megatron fills in
    ):
        yield (
            f"recompute_modules={modules!r} has no effect without "
            f"recompute_granularity='selective'."
        )
    stages = config.pipeline_model_parallel_size
    sent = torch.bfloat16 if config.bf16 else config.params_dtype
    if stages > 1 and config.pipeline_dtype not in (None, sent):
        yield (
            f"pipeline_dtype={config.pipeline_dtype}: a stage computes and sends {sent}, and "
            f"the next one would receive something else. Legal: {sent}."
        )
    chunks = config.virtual_pipeline_model_parallel_size
    if stages > 2 and chunks is not None and config.variable_seq_lengths:
        yield (
            f"variable_seq_lengths=True with PP = {stages} and VPP = {chunks}: stages send each "
            f"other shapes before tensors, and in Megatron's interleaved schedule more than two "
            f"can wait for each other for ever. Leave it at False."
        )
    if config.num_moe_experts and config.moe_apply_probs_on_input and config.moe_router_topk != 1:
        yield (
            f"moe_apply_probs_on_input=True needs one expert per token; moe_router_topk="
            f"{config.moe_router_topk}. Leave it at False, or set moe_router_topk=1."
        )
    if config.num_moe_experts or "F" in letters:
        yield from _ignored_by_activations(config)


def _ignored_by_activations(config: TransformerConfig) -> Iterator[str]:
    """Yield settings that the activation of an expert or an MLP would ignore, or does not
    implement."""
    fused = config.bias_activation_fusion
    if fused and not (config.activation_func is F.silu and config.gated_linear_unit):
        yield (
            "bias_activation_fusion=True: only silu with a gate has a fused kernel in all of "
            "Megatron's experts, and one that computes the same function in its MLP. Leave it at "
            "False for other activations."
        )
    overlapped = config.moe_shared_expert_overlap and config.moe_shared_expert_intermediate_size
    for culprit, on in (
        ("bias_activation_fusion", fused),
        ("use_te_activation_func", config.use_te_activation_func),
        ("moe_shared_expert_overlap", overlapped),
        ("gated_linear_unit", not config.gated_linear_unit),
    ):
        for name in ("glu_linear_offset", "activation_func_clamp_value"):
            if getattr(config, name) and on:
                yield (
                    f"{name}={getattr(config, name)} would be ignored with "
                    f"{culprit}={getattr(config, culprit)}. Leave one of them at its default."
                )


def training_violations(
    model: TransformerConfig, ddp: DistributedDataParallelConfig, optimizer: OptimizerConfig | None
) -> Iterator[str]:
    """Yield settings of the data-parallel wrapper and the optimizer (None: there is none) that do
    not fit the model's."""
    if model.bf16 and not ddp.grad_reduce_in_fp32:
        yield (
            "DistributedDataParallelConfig.grad_reduce_in_fp32=False: in bf16 the gradients of all "
            "microbatches would be summed in bfloat16, and their number per rank would "
            "change the sum. Legal: True."
        )
    yield from fsdp_violations(model, ddp)
    if ddp.average_in_collective and model.calculate_per_token_loss:
        yield (
            "DistributedDataParallelConfig.average_in_collective=True: with "
            "calculate_per_token_loss=True gradients are summed, and then divided by the number of "
            "tokens. Legal: False."
        )
    needed = ("use_distributed_optimizer", "overlap_grad_reduce")
    if ddp.overlap_param_gather and (off := [n for n in needed if not getattr(ddp, n)]):
        yield (
            f"DistributedDataParallelConfig.overlap_param_gather=True with "
            f"{' and '.join(f'{name}=False' for name in off)}: Megatron gathers parameters during "
            f"the forward pass only with both {' and '.join(f'{name}=True' for name in needed)}."
        )
    if optimizer is not None and optimizer.bf16 != model.bf16:
        yield (
            f"OptimizerConfig.bf16={optimizer.bf16}, and the model has bf16={model.bf16}: a "
            f"bf16 model needs float32 master weights. Legal: {model.bf16}."
        )
