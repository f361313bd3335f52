"""The configuration of an exported hybrid model. Fields have Megatron-Core's names and meaning."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

DEFAULTS: dict[str, Any] = {
    # A letter for each layer: A attention, M Mamba, E mixture of experts, F dense MLP, R M²RNN.
    "pattern": "A",
    # The mixer of M: nemo_native is Mamba-2, mamba3 is Mamba-3.
    "mode": "nemo_native",
    "num_layers": 1,
    # Rows of the embedding, padding included.
    "vocab_size": 128,
    "hidden_size": 64,
    "seq_length": 4096,
    "layernorm_epsilon": 1e-5,
    "add_bias_linear": False,
    "use_cache": True,
    # A
    "num_attention_heads": 1,
    "num_query_groups": 1,
    "kv_channels": 64,
    "add_qkv_bias": False,
    "attention_output_gate": False,
    "softmax_scale": None,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    # F and E; the activation is silu, gelu, relu2 or quick_gelu.
    "ffn_hidden_size": 64,
    "gated_linear_unit": True,
    "activation": "silu",
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    # E
    "num_moe_experts": None,
    "moe_ffn_hidden_size": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_router_topk": 2,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_dtype": "fp32",
    "moe_apply_probs_on_input": False,
    # M; num_angles counts the channel pairs of the state that rotate.
    "mamba_num_heads": 1,
    "mamba_head_dim": 64,
    "mamba_state_dim": 128,
    "mamba_num_groups": 1,
    "mamba3_mimo_rank": 1,
    "mamba3_num_angles": 1,
    "mamba3_pairs": "interleaved",
    "mamba3_A_activation": "softplus",
    "mamba3_A_floor": 1e-4,
    "mamba3_output_norm": False,
    # R
    "m2rnn_num_heads": 1,
    "m2rnn_key_head_dim": 64,
    "m2rnn_value_head_dim": 16,
    "m2rnn_conv_kernel": 4,
    "m2rnn_depth_state": False,
    # What `nemo-megacpp checkpoint import` makes the checkpoint again from.
    "source": None,
}


class NemoMegacppConfig(PretrainedConfig):
    """Sizes and settings of a model, as ``config.json`` holds them.

    Args:
        fields: those of ``DEFAULTS``, and those of transformers' base class.
    """

    model_type = "nemo_megacpp"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
        "max_position_embeddings": "seq_length",
    }

    def __init__(self, **fields: Any):
        for name, default in DEFAULTS.items():
            setattr(self, name, fields.pop(name, default))
        super().__init__(**fields)
