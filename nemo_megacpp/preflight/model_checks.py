"""Validation of a recipe's layout and model, and of what this machine can compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.errors import UserError, raise_violations
from nemo_megacpp.layout import validate_layout
from nemo_megacpp.mixers.core_attention import validate_torch_attention
from nemo_megacpp.mixers.norm import validate_torch_norm
from nemo_megacpp.pattern import Family
from nemo_megacpp.recipes.catalog import NAM56R_MODEL
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.views import model_settings, shape_of
from nemo_megacpp.runtime.host import current_host
from nemo_megacpp.specs.backend import TorchBackend, default_backend


def validate_recipe_layout(recipe: Recipe, gpus_per_node: int | None = None) -> None:
    """Validate the layout.

    Args:
        recipe: resolved.
        gpus_per_node: ranks of an NVLink domain, which a TP group may not leave.

    Raises:
        UserError: numbered violations, each with its numbers and the nearest legal choices.
    """
    validate_layout(recipe.layout, shape_of(recipe), gpus_per_node=gpus_per_node)


def validate_model(recipe: Recipe, device: str | None = None) -> HybridConfig:
    """Return the configuration of the model.

    Args:
        recipe: resolved.
        device: ``"cuda"`` or ``"cpu"``; None: this machine's.

    Raises:
        UserError: sizes below 1, more experts per token than experts, a setting that is neither
            proved nor neutral, or Megatron's own reason.
    """
    _validate_low_precision(recipe.model)
    raise_violations(_size_violations(recipe))  # Megatron divides by sizes
    try:
        return HybridConfig(**model_settings(recipe, device or current_host().device))
    except UserError:
        raise
    except (AssertionError, ImportError, ValueError) as error:
        raise UserError(f"Megatron refuses this model: {error}") from None


def _size_violations(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    for name, value in model.items():
        if type(NAM56R_MODEL.get(name)) is int and value is not None and value < 1:
            yield f"{name}: {value} must be at least 1."
    chosen, experts = model["moe_router_topk"], model["num_moe_experts"]
    if Family.EXPERT in recipe.pattern.all_families and chosen > (experts or 0):
        yield f"moe_router_topk={chosen} experts per token are more than num_moe_experts={experts}."
    recurrent = recipe.pattern.letters.count(Family.RECURRENT.value)
    if model.get("m2rnn_depth_state") and recurrent < 2:
        yield (
            f"m2rnn_depth_state=true hands a state from one R block to the next, and the pattern "
            f"has {recurrent} R. Add R blocks, or leave it out."
        )


def _validate_low_precision(model: dict[str, Any]) -> None:
    """Megatron's configuration fails on FP8 without Transformer Engine for no stated reason."""
    if model.get("fp8") is not None and isinstance(default_backend(), TorchBackend):
        raise UserError(
            f"fp8={model['fp8']!r} needs Transformer Engine, which is not installed. Install it, "
            f"or leave fp8 out."
        )


def validate_host(recipe: Recipe, config: HybridConfig) -> None:
    """Validate that this machine has the modules and kernels of a recipe.

    Args:
        recipe: resolved.
        config: of :func:`validate_model`.

    Raises:
        UserError: settings that need Transformer Engine or a GPU where there is none, or that the
            modules would refuse in the first step.
    """
    device = current_host().device
    present = config.pattern.all_families
    if isinstance(default_backend(), TorchBackend):
        validate_torch_norm(config)
        if Family.ATTENTION in present:
            validate_torch_attention(config)
        if config.use_te_activation_func and {Family.EXPERT, Family.FEED_FORWARD} & {*present}:
            raise UserError(
                "use_te_activation_func=True needs Transformer Engine, which is not installed. "
                "Leave it at False."
            )
    kernels = {"m2rnn_kernel": Family.RECURRENT in present}
    kernels["mamba3_kernel"] = Family.MAMBA in present and config.mode == "mamba3"
    for name, used in kernels.items():
        if used and getattr(config, name) == "triton" and device == "cpu":
            raise UserError(f"{name}='triton' needs a GPU, this machine has none. Use 'auto'.")
    layout = recipe.layout
    heads, rest = divmod(config.m2rnn_num_heads or 0, layout.tp)
    exchange = config.m2rnn_context_parallel
    if Family.RECURRENT in present and exchange == "all_to_all" and (rest or heads % layout.cp):
        raise UserError(
            f"m2rnn_context_parallel='all_to_all' needs the heads of a tensor-parallel rank to "
            f"divide by CP: m2rnn_num_heads={config.m2rnn_num_heads} / TP={layout.tp} = {heads}, "
            f"CP={layout.cp}. Choose 'serial' or 'auto'."
        )
    capacity = config.moe_expert_capacity_factor
    packed = recipe.training.packed_documents and layout.cp > 1
    if packed and capacity is not None and Family.EXPERT in present:
        raise UserError(
            f"packed_documents with CP={layout.cp} and moe_expert_capacity_factor={capacity}: "
            f"which of two equally probable tokens is dropped would depend on the layout. Leave "
            f"the capacity factor out, or use CP=1."
        )
