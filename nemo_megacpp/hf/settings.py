"""A checkpoint's model as an export describes it, and the settings that no export expresses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nemo_megacpp.checkpoint.identity import FILE as IDENTITY
from nemo_megacpp.checkpoint.identity import saved_model
from nemo_megacpp.errors import UserError, raise_violations
from nemo_megacpp.hf.exchange import EMBEDDING, mamba_heads

if TYPE_CHECKING:
    from nemo_megacpp.checkpoint.content import CheckpointContent
    from nemo_megacpp.config import HybridConfig

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""What an export can be converted to."""

# fmt: off
FIELDS = (
    "mode", "num_layers", "hidden_size", "seq_length", "layernorm_epsilon", "add_bias_linear",
    "num_attention_heads", "num_query_groups", "kv_channels", "add_qkv_bias",
    "attention_output_gate", "softmax_scale", "position_embedding_type", "rotary_base",
    "rotary_percent", "ffn_hidden_size", "gated_linear_unit", "activation_func_clamp_value",
    "glu_linear_offset", "num_moe_experts", "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_router_topk",
    "moe_router_score_function", "moe_router_pre_softmax", "moe_router_num_groups",
    "moe_router_group_topk", "moe_router_topk_scaling_factor", "moe_router_enable_expert_bias",
    "moe_router_dtype", "moe_apply_probs_on_input", "mamba_head_dim", "mamba_state_dim",
    "mamba_num_groups", "mamba3_mimo_rank", "mamba3_A_activation", "mamba3_A_floor",
    "mamba3_output_norm", "m2rnn_num_heads", "m2rnn_key_head_dim", "m2rnn_value_head_dim",
    "m2rnn_conv_kernel", "m2rnn_depth_state",
)
"""Fields of ``HybridConfig`` that ``config.json`` has under the same name; with what
:func:`derived_fields` adds, all that decide what the model computes."""
# fmt: on


def read_model(content: CheckpointContent, dtype: str | None = None) -> HybridConfig:
    """Return the configuration of a checkpoint's model on one rank.

    Args:
        content: the checkpoint.
        dtype: torch's name of the dtype that the export will have; None: the checkpoint's.

    Raises:
        UserError: it does not say which model it holds, or a setting cannot be exported.
    """
    import torch

    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: the choices are {', '.join(DTYPES)}.")
    if content.identity is None:
        raise UserError(
            f"{content.directory} does not say which model it holds (it has no nemo_megacpp.json), "
            f"so no config.json can be written for it."
        )
    if EMBEDDING not in content.model_tensors:
        raise UserError(f"{content.directory} has no {EMBEDDING}.")
    kept = dtype or content.model_tensors[EMBEDDING].dtype
    model = content.identity["model"]
    fields, _ = saved_model(content.directory, content.identity)
    words, hidden = fields["vocab_size"], fields["hidden_size"]
    shape = content.model_tensors[EMBEDDING].shape
    if len(shape) != 2 or not 0 < words <= shape[0] or hidden != shape[1]:
        raise UserError(
            f"{content.directory / IDENTITY} is damaged: it has a vocab_size of {words} and a "
            f"hidden_size of {hidden}, and the embedding has the shape {shape}."
        )
    raise_violations(
        f"{content.directory}: {name}={model[name]}: {reason}"
        for name, reason in (
            ("family_modules", "an export runs no code of a user's family."),
            ("side_channels", "the export's tokens have no side channels."),
        )
        if model.get(name)
    )
    # No model trains in float16; the dtype decides on nothing but the router's default.
    config = build_config(model, torch.float32 if kept == "float16" else getattr(torch, kept))
    raise_violations(f"{content.directory}: {text}" for text in _not_exported(config))
    return config


def build_config(model: dict[str, Any], dtype: Any) -> HybridConfig:
    """Return the configuration of a model on one rank.

    Args:
        model: fields of ``HybridConfig``.
        dtype: torch's, of parameters.

    Raises:
        UserError: the fields describe no model.
    """
    from nemo_megacpp.config import HybridConfig, config_fields
    from nemo_megacpp.layout import ParallelLayout

    try:
        return HybridConfig(**config_fields(model, ParallelLayout.parse("tp=1"), dtype, "cpu"))
    except UserError:
        raise
    except Exception as error:  # Megatron's assertions
        raise no_model(error) from None


def no_model(error: Exception) -> UserError:
    """Return what to tell a user of settings with which Megatron fails."""
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return UserError(f"This describes no model: {reason}.")


def _not_exported(config: HybridConfig) -> Iterator[str]:
    experts = "E" in config.pattern.letters
    if experts and config.moe_expert_capacity_factor is not None:
        yield (
            f"moe_expert_capacity_factor={config.moe_expert_capacity_factor}: a token is dropped "
            f"by what else is in its microbatch, which generation has not."
        )
    if experts and config.add_bias_linear:
        yield "add_bias_linear=True with E blocks: the export's experts have no biases."
    if config.layernorm_zero_centered_gamma:
        yield "layernorm_zero_centered_gamma=True: the export's norms have a gain around one."
    if set(config.pattern.letters) & {"E", "F"} and activation_name(config) is None:
        name = getattr(config.activation_func, "__name__", config.activation_func)
        yield f"activation_func={name}: an export has silu, gelu, relu2 or quick_gelu."


def activation_name(config: HybridConfig) -> str | None:
    """Return the export's name of the activation of experts and MLPs; None if it has none."""
    from nemo_megacpp.config import ACTIVATIONS

    names = [name for name, function in ACTIVATIONS.items() if function is config.activation_func]
    return names[0] if names else None


def model_fields(config: HybridConfig, rows: int) -> dict[str, Any]:
    """Return the fields of ``config.json`` that describe a model.

    Args:
        config: of the model.
        rows: of its embedding.
    """
    fields = {name: getattr(config, name) for name in FIELDS}
    return {
        "pattern": config.pattern.letters,
        **fields,
        **derived_fields(config),
        "vocab_size": rows,
    }


def derived_fields(config: HybridConfig) -> dict[str, Any]:
    """Return the fields that do not stand in the configuration as they are."""
    from nemo_megacpp.mixer_settings import Mamba3Settings

    heads = mamba_heads(config) if "M" in config.pattern.letters else 1
    fields: dict[str, Any] = {
        "activation": activation_name(config) or "silu",
        "mamba_num_heads": heads,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }
    if config.mode == "mamba3" and "M" in config.pattern.letters:
        dims = Mamba3Settings.of(config).dimensions(config)
        fields |= {"mamba3_num_angles": dims.num_angles, "mamba3_pairs": dims.pairs}
    return fields
