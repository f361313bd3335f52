"""What an export can express, a model each."""

from __future__ import annotations

from tests.hf.models import spec

CASES = {
    "A": spec("AF"),
    "A gate, biases of q, k, v": spec(
        "A", attention_output_gate=True, add_qkv_bias=True, softmax_scale=0.3
    ),
    "A half turns, no padding": spec(
        "A", kv_channels=8, rotary_percent=0.5, rotary_base=500, make_vocab_size_divisible_by=0
    ),
    "A no positions": spec("AM", position_embedding_type="none", layernorm_epsilon=1e-3),
    "biases": spec("AF", add_bias_linear=True, gated_linear_unit=False, activation_func="gelu"),
    "tied": spec("MA", share_embeddings_and_output_weights=True),
    "M": spec("MM", vocab_size=258),  # the smallest of a byte-level tokenizer
    "E": spec("EE"),
    "E softmax": spec(
        "E",
        moe_router_score_function="softmax",
        moe_router_enable_expert_bias=False,
        moe_router_pre_softmax=True,
        moe_router_topk_scaling_factor=2.5,
        moe_shared_expert_gate=True,
    ),
    "E softmax after top-k": spec(
        "E",
        moe_router_score_function="softmax",
        moe_router_enable_expert_bias=False,
        moe_shared_expert_intermediate_size=None,
        activation_func="relu2",
        gated_linear_unit=False,
    ),
    "E groups": spec(
        "E",
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        activation_func_clamp_value=0.2,
        glu_linear_offset=1.0,
    ),
    "E one": spec("E", moe_router_topk=1, moe_apply_probs_on_input=True),
    "R": spec("RR"),
    "R depth": spec("RARMR", m2rnn_depth_state=True, m2rnn_conv_kernel=1),
    "SISO": spec("MM", mode="mamba3"),
    "MIMO": spec(
        "MM",
        mode="mamba3",
        mamba3_mimo_rank=3,
        mamba3_output_norm=True,
        mamba3_A_activation="heavy_tail",
        mamba3_rope_fraction=1.0,
    ),
    "all": spec("AEMRF"),
}

_NATIVE = {
    "position_embedding_type": "none",
    "gated_linear_unit": False,
    "activation_func": "relu2",
}
NATIVE = {
    "native": spec("MAEFM", moe_router_topk_scaling_factor=2.5, **_NATIVE),
    "native groups": spec(
        "EA",
        moe_router_topk=4,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_enable_expert_bias=False,
        **_NATIVE,
    ),
}
"""What transformers' ``nemotron_h`` can express."""
CASES |= NATIVE
