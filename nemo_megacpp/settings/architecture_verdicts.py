"""Verdicts on what ``TransformerConfig`` says of the model's shape, attention and first weights."""

from __future__ import annotations

from nemo_megacpp.settings.verdict import Table, neutral, only_with, proved, refused

_SIZE = "A size: part of the model's identity, the same in all layouts, and checked against them"
_STRUCTURE = "Part of the model's identity: the same function of a token in all layouts"
_FIRST_WEIGHTS = "Draws first weights; layouts are compared on the same weights"
_OTHER_CUTS = "Write the pipeline cuts into the pattern, as in 'AEME|AEMEAEMR'"
_PATTERN = "Which layers there are is said by the pattern"
_NO_OTHER_ATTENTION = "An A block is grouped-query attention with RoPE"
_MASKS = (
    "Proved where the generators are the same; else a rank draws other masks of the same "
    "probability"
)


def _covering(*fields: str) -> tuple[str, ...]:
    return tuple(f"covering:TransformerConfig.{field}" for field in fields)


ARCHITECTURE: Table = {
    # Layers.
    "num_layers": neutral(_SIZE),
    "is_hybrid_model": neutral(_FIRST_WEIGHTS),
    "num_layers_in_first_pipeline_stage": refused(_OTHER_CUTS),
    "num_layers_in_last_pipeline_stage": refused(_OTHER_CUTS),
    "pipeline_model_parallel_layout": refused(_OTHER_CUTS),
    "account_for_embedding_in_pipeline_split": refused(_OTHER_CUTS),
    "account_for_loss_in_pipeline_split": refused(_OTHER_CUTS),
    "moe_layer_freq": refused(_PATTERN),
    "linear_attention_freq": refused(_PATTERN),
    "heterogeneous_block_specs": refused(_PATTERN),
    "hetereogenous_dist_checkpoint": refused(_PATTERN),
    "mtp_num_layers": refused("MambaModel has no multi-token prediction"),
    "mtp_loss_scaling_factor": only_with("mtp_num_layers"),
    # Sizes.
    "hidden_size": neutral(_SIZE),
    "num_attention_heads": neutral(_SIZE),
    "num_query_groups": neutral(_SIZE),
    "ffn_hidden_size": neutral(
        "No block has a dense MLP; it is the default of moe_ffn_hidden_size alone"
    ),
    "kv_channels": proved(
        "The width of a head, which the layout does not touch", *_covering("kv_channels")
    ),
    "mamba_state_dim": neutral(_SIZE),
    "mamba_head_dim": neutral(_SIZE),
    "mamba_num_groups": neutral(_SIZE),
    "mamba_num_heads": neutral(_SIZE),
    "use_mamba_mem_eff_path": refused(
        "Without it Megatron's mixer takes no packs, and no case has that path"
    ),
    # Attention.
    "softmax_scale": proved("One number for all heads", *_covering("softmax_scale")),
    "softmax_type": refused(
        "The core attention of the torch backend has no offset in its softmax, and no case has "
        "tried Transformer Engine's"
    ),
    "attention_output_gate": proved(
        "A gate for each head, split with it", *_covering("attention_output_gate")
    ),
    "add_qkv_bias": proved("Split with the heads", *_covering("add_qkv_bias")),
    "window_size": refused(
        "The core attention of the torch backend has no window, and no case has tried "
        "Transformer Engine's under CP"
    ),
    "window_attn_skip_freq": only_with("window_size"),
    "rotary_interleaved": refused("MambaModel turns channels (i, i + d/2)"),
    "no_rope_freq": refused("Every A block has RoPE, or none has (position_embedding_type)"),
    "mrope_section": refused(_NO_OTHER_ATTENTION),
    "multi_latent_attention": refused(_NO_OTHER_ATTENTION),
    "qk_layernorm": refused(_NO_OTHER_ATTENTION),
    "qk_l2_norm": refused(_NO_OTHER_ATTENTION),
    "qk_clip": refused(_NO_OTHER_ATTENTION),
    "qk_clip_alpha": only_with("qk_clip"),
    "qk_clip_threshold": only_with("qk_clip"),
    "log_max_attention_logit": refused("Only Transformer Engine records it, and only GPT logs it"),
    "experimental_attention_variant": refused(_NO_OTHER_ATTENTION),
    "dsa_indexer_n_heads": only_with("experimental_attention_variant"),
    "dsa_indexer_head_dim": only_with("experimental_attention_variant"),
    "dsa_indexer_topk": only_with("experimental_attention_variant"),
    "dsa_indexer_loss_coeff": only_with("experimental_attention_variant"),
    "dsa_indexer_use_sparse_loss": only_with("experimental_attention_variant"),
    "linear_conv_kernel_dim": only_with("experimental_attention_variant"),
    "linear_key_head_dim": only_with("experimental_attention_variant"),
    "linear_value_head_dim": only_with("experimental_attention_variant"),
    "linear_num_key_heads": only_with("experimental_attention_variant"),
    "linear_num_value_heads": only_with("experimental_attention_variant"),
    "apply_query_key_layer_scaling": refused(
        "Transformer Engine takes it from an environment variable, and the torch backend not at all"
    ),
    "attention_softmax_in_fp32": neutral(
        "Only Megatron's DotProductAttention reads it; the stack's attention has its softmax in "
        "float32 always"
    ),
    "test_mode": neutral("Compares the replicas of an A block's tensors, and changes none"),
    # Norms, residuals, dropout, biases, activations.
    "normalization": neutral(
        "The norm of every block",
        legal=("RMSNorm",),
        otherwise="The torch backend has no other, and no case has tried Transformer Engine's",
    ),
    "layernorm_epsilon": neutral(_STRUCTURE),
    "layernorm_zero_centered_gamma": neutral(
        "Where a gain's zero is, inside the norm; Transformer Engine has it, the torch backend "
        "refuses it"
    ),
    "apply_residual_connection_post_layernorm": refused("Megatron-Core 0.16 has no code for it"),
    "fp32_residual_connection": refused(
        "In bf16 the stack's blocks take and send bfloat16, and Megatron's embedding would not"
    ),
    "hidden_dropout": proved(_MASKS, *_covering("hidden_dropout")),
    "attention_dropout": proved(
        _MASKS, "tests/specs/test_dropout.py::test_axes_that_do_not_change_the_masks"
    ),
    "add_bias_linear": proved(
        "Where every block of the pattern has biases", *_covering("add_bias_linear")
    ),
    "gated_linear_unit": proved("Split with the expert's width", *_covering("gated_linear_unit")),
    "activation_func": proved("A function of one element", *_covering("activation_func")),
    "glu_linear_offset": neutral("Added to one element inside an expert"),
    "activation_func_clamp_value": neutral("A bound on one element inside an expert"),
    # First weights.
    "init_method": neutral(_FIRST_WEIGHTS),
    "output_layer_init_method": neutral(_FIRST_WEIGHTS),
    "init_method_std": neutral(_FIRST_WEIGHTS),
    "embedding_init_method": neutral(_FIRST_WEIGHTS),
    "embedding_init_method_std": neutral(_FIRST_WEIGHTS),
    "init_model_with_meta_device": refused("Only Megatron's FSDP fills such weights"),
    # The loss.
    "calculate_per_token_loss": proved(
        "What the loss is averaged over", *_covering("calculate_per_token_loss")
    ),
}
