"""What a hybrid stack refuses of Megatron's ``TransformerConfig``.

Settings that nothing in it would read, routing that depends on the layout, and numbers that mean
nothing: Megatron takes them without a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Literal, get_args

from megatron.core.transformer import TransformerConfig

from nemo_megacpp.errors import UserError

# Not Megatron's "sinkhorn": it normalises over the tokens that a rank happens to hold, so that
# every layout would route differently.
LoadBalancing = Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"]

_OTHER_CUTS = "Write the pipeline cuts into the pattern, as in 'AEME|AEMEAEMR'"
_PATTERN = "Which layers there are is said by the pattern"
_NO_OTHER_ATTENTION = "An A block is grouped-query attention with RoPE"

_UNREAD = {
    "pipeline_model_parallel_layout": _OTHER_CUTS,
    "num_layers_in_first_pipeline_stage": _OTHER_CUTS,
    "num_layers_in_last_pipeline_stage": _OTHER_CUTS,
    "account_for_embedding_in_pipeline_split": _OTHER_CUTS,
    "account_for_loss_in_pipeline_split": _OTHER_CUTS,
    "moe_layer_freq": _PATTERN,
    "linear_attention_freq": _PATTERN,
    "heterogeneous_block_specs": _PATTERN,
    "mtp_num_layers": "MambaModel has no multi-token prediction",
    "multi_latent_attention": _NO_OTHER_ATTENTION,
    "experimental_attention_variant": _NO_OTHER_ATTENTION,
    "qk_layernorm": _NO_OTHER_ATTENTION,
    "qk_l2_norm": _NO_OTHER_ATTENTION,
    "qk_clip": _NO_OTHER_ATTENTION,
    # MambaModel does not tell its rotary embedding, which then turns channels by angles that are
    # not those of their pair.
    "rotary_interleaved": "MambaModel turns channels (i, i + d/2)",
    "apply_residual_connection_post_layernorm": "Megatron-Core 0.16 has no code for it",
    "moe_use_legacy_grouped_gemm": "The experts are the backend's",
    "use_kitchen": "The backend is Transformer Engine or plain torch",
    # TransformerBlock and GPTModel do these, and neither is in a hybrid model.
    "cpu_offloading": "Only Megatron's TransformerBlock offloads",
    "fine_grained_activation_offloading": "Only Megatron's GPTModel offloads",
    "defer_embedding_wgrad_compute": "Only Megatron's GPTModel defers it",
    "overlap_moe_expert_parallel_comm": "Only Megatron's GPTModel has a schedule for it",
    "delay_wgrad_compute": "Only Megatron's GPTModel has a schedule for it",
    "fp4": "Only Megatron's TransformerBlock runs layers in FP4",
}
"""Field that has to stay at its default -> why."""


def refuse_unread(config: TransformerConfig) -> None:
    """Refuse what the hybrid stack would ignore.

    Args:
        config: of the model, a plain one or a :class:`nemo_megacpp.config.HybridConfig`.

    Raises:
        UserError: for the first such field that is not at its default.
    """
    for field in dataclasses.fields(TransformerConfig):
        value = getattr(config, field.name)
        if field.name in _UNREAD and (value or None) != (field.default or None):
            raise UserError(
                f"{field.name}={value!r} is not read by the hybrid stack. {_UNREAD[field.name]}; "
                f"leave {field.name} at {field.default!r}."
            )
    if config.recompute_granularity == "full":
        raise UserError(
            "recompute_granularity='full' is not supported by the hybrid stack; "
            "'selective' (core_attn, moe, shared_experts, …) and None are."
        )
    for name in ("recompute_modules", "recompute_method", "recompute_num_layers"):
        if config.recompute_granularity is None and getattr(config, name) not in (
            None,
            ["core_attn"],  # what Megatron fills in
        ):
            raise UserError(
                f"{name}={getattr(config, name)!r} has no effect without "
                f"recompute_granularity='selective'."
            )


def refuse_routing(config: TransformerConfig) -> None:
    """Refuse routing that depends on which rank holds a token.

    Args:
        config: as for :func:`refuse_unread`.

    Raises:
        UserError: for the first such setting.
    """
    if config.moe_expert_capacity_factor is not None and (
        config.moe_pad_expert_input_to_capacity or config.moe_token_drop_policy != "probs"
    ):
        raise UserError(
            "moe_expert_capacity_factor drops the least probable tokens of a microbatch: "
            "moe_token_drop_policy must be 'probs' and moe_pad_expert_input_to_capacity false. "
            "The other forms depend on which rank holds a token."
        )
    balancing = config.moe_router_load_balancing_type
    for kind in balancing if isinstance(balancing, list) else [balancing]:
        if kind not in get_args(LoadBalancing):
            known = ", ".join(get_args(LoadBalancing))
            raise UserError(f"moe_router_load_balancing_type={kind!r}: it is one of {known}.")


def refuse_biases(config: TransformerConfig, unbiased: list[str]) -> None:
    """Refuse biases that some blocks of the pattern would have and others not.

    Args:
        config: as for :func:`refuse_unread`.
        unbiased: letters of the pattern whose mixers have no biases.

    Raises:
        UserError: with the letters.
    """
    if config.add_bias_linear and unbiased:
        raise UserError(
            f"add_bias_linear=True: the projections of {' and '.join(unbiased)} have no biases, so "
            f"only some blocks of this pattern would have them. Leave add_bias_linear at False."
        )


def refuse_meaningless(config: TransformerConfig) -> None:
    """Refuse numbers outside their range.

    Args:
        config: as for :func:`refuse_unread`.

    Raises:
        UserError: for the first such number.
    """
    for name in ("hidden_dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name}: {getattr(config, name)} must be at least 0 and below 1.")
    for name in ("layernorm_epsilon", "softmax_scale", "moe_expert_capacity_factor"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"{name}: {value} must be above 0.")
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(coefficients, list) != isinstance(kinds, list):
        raise UserError(
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
                raise UserError(f"{name}: {number} must be at least 0.")


_RECOMPUTED = {
    "A": ("core_attn",),
    "E": ("moe", "shared_experts", "moe_act", "layernorm"),
    "M": (),
    "R": (),
}
"""What the blocks of a family can recompute in the backward pass."""


def refuse_recompute(config: TransformerConfig, letters: Collection[str]) -> None:
    """Refuse modules to be recomputed that no block of the pattern has.

    Args:
        config: as for :func:`refuse_unread`.
        letters: of the pattern. What a user's own family recomputes is not known here.

    Raises:
        UserError: for the first such module.
    """
    if config.recompute_granularity != "selective" or not set(letters) <= set(_RECOMPUTED):
        return
    can = [name for letter in letters for name in _RECOMPUTED[letter]]
    if not config.moe_shared_expert_intermediate_size and "shared_experts" in can:
        can.remove("shared_experts")
    asked = config.recompute_modules
    known = {"mlp", "mla_up_proj", *(name for names in _RECOMPUTED.values() for name in names)}
    wrong = [
        name for name in (["core_attn"] if asked is None else asked) if name in known - set(can)
    ]
    if wrong or asked == []:
        default = " (Megatron's default)" if asked is None else ""
        raise UserError(
            f"recompute_modules={asked or wrong}{default}: "
            + (f"no block of this model recomputes {', '.join(wrong)}. " if wrong else "is empty. ")
            + (
                f"It can recompute {', '.join(can)}."
                if can
                else "Its blocks recompute nothing; leave recompute_granularity out."
            )
        )


def refuse_mamba_path(config: TransformerConfig) -> None:
    """Refuse the second path of Megatron's ``MambaMixer``.

    Args:
        config: as for :func:`refuse_unread`.

    Raises:
        UserError: ``use_mamba_mem_eff_path`` is off.
    """
    if not config.use_mamba_mem_eff_path:
        raise UserError(
            "use_mamba_mem_eff_path=False: Megatron keeps this path for inference. It computes the "
            "same with more memory, cannot take packed documents, and is not tested in training. "
            "Leave it at True."
        )
