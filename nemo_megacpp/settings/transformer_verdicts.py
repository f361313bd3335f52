"""Verdicts on the fields of ``TransformerConfig``, with those that it inherits. Loads no torch."""

from __future__ import annotations

from nemo_megacpp.settings.parallel_verdicts import PARALLELISM, PREDICTION
from nemo_megacpp.settings.release_verdicts import INFERENCE, SINCE_0_17, UNTIL_0_16
from nemo_megacpp.settings.verdict import (
    covered,
    neutral,
    only_with,
    proved,
    refused,
    table,
)

_MASKS = "Proved where the generators are the same; else a rank draws other masks, equally probable"
_SCORES = "A function of one token's scores"

_ARCHITECTURE = table(
    # Layers and sizes.
    neutral(
        """num_layers hidden_size num_attention_heads num_query_groups mamba_state_dim
        mamba_head_dim mamba_num_groups mamba_num_heads num_moe_experts moe_ffn_hidden_size
        moe_shared_expert_intermediate_size ffn_hidden_size""",
        "A size of the model, the same in all layouts, against which they are validated",
    ),
    refused(
        """num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split""",
        "Write the pipeline cuts into the pattern, as in 'AEME|AEMEAEMR'",
    ),
    refused(
        """moe_layer_freq linear_attention_freq heterogeneous_block_specs
        hetereogenous_dist_checkpoint""",
        "The pattern says which layers there are",
    ),
    proved(
        "mtp_num_layers",
        "Follows from the pattern, which has the prediction depths after a '/'; MambaModel of 0.16 "
        "builds none, and they are refused there",
        *PREDICTION,
    ),
    covered("kv_channels", "The width of a head, which no layout splits"),
    refused("use_mamba_mem_eff_path", "Without it Megatron's mixer takes no packed sequences"),
    # Attention.
    covered("softmax_scale", "One number for all heads"),
    refused(
        "softmax_type",
        "The torch backend's core attention has no softmax offset, and no case covers Transformer "
        "Engine's",
    ),
    covered("attention_output_gate", "A gate for each head, split with it"),
    covered("add_qkv_bias", "Split with the heads"),
    refused(
        "window_size",
        "The torch backend's core attention has no window, and no case covers Transformer "
        "Engine's under CP",
    ),
    only_with("window_attn_skip_freq", "window_size"),
    refused("rotary_interleaved", "MambaModel rotates channels (i, i + d/2)"),
    refused("no_rope_freq", "Every A block has RoPE, or none has (position_embedding_type)"),
    refused(
        """mrope_section multi_latent_attention qk_layernorm qk_l2_norm qk_clip
        experimental_attention_variant""",
        "An A block is grouped-query attention with RoPE",
    ),
    only_with("qk_clip_alpha qk_clip_threshold", "qk_clip"),
    refused("log_max_attention_logit", "Only Transformer Engine records it, and only GPT logs it"),
    only_with(
        """dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff
        dsa_indexer_use_sparse_loss linear_conv_kernel_dim linear_key_head_dim
        linear_value_head_dim linear_num_key_heads linear_num_value_heads""",
        "experimental_attention_variant",
    ),
    refused("apply_query_key_layer_scaling", "An environment variable sets it; torch ignores it"),
    neutral("attention_softmax_in_fp32", "The stack's attention always has a float32 softmax"),
    neutral("test_mode", "Compares the replicas of an A block's tensors, and changes none"),
    # Norms, residuals, dropout, biases, activations.
    neutral(
        "normalization",
        "The norm of every block",
        legal=("RMSNorm",),
        otherwise="The torch backend has no other, and no case covers Transformer Engine's",
    ),
    neutral("layernorm_epsilon", "The same function of a token in all layouts"),
    neutral(
        "layernorm_zero_centered_gamma",
        "Where a gain's zero is, inside the norm; only Transformer Engine has it, and the torch "
        "backend refuses it",
    ),
    refused("apply_residual_connection_post_layernorm", "Megatron-Core 0.16 does not implement it"),
    refused("fp32_residual_connection", "Blocks send bfloat16, Megatron's embedding float32"),
    covered("hidden_dropout", _MASKS),
    proved(
        "attention_dropout",
        _MASKS,
        "tests/specs/test_dropout.py::test_axes_that_do_not_change_the_masks",
    ),
    covered("add_bias_linear", "Where every block of the pattern has biases"),
    covered("gated_linear_unit", "Split with the width of an expert or an MLP"),
    covered("activation_func", "A function of one element"),
    neutral(
        "glu_linear_offset activation_func_clamp_value",
        "Acts on one element in an expert or an MLP",
    ),
    # Initial weights and the loss.
    refused("init_model_with_meta_device", "Only Megatron's FSDP fills such weights"),
    covered("calculate_per_token_loss", "What the loss is averaged over"),
)

_EXPERTS = table(
    # Kinds of experts.
    covered("moe_shared_expert_gate", "A gate that all ranks of a tensor-parallel group hold"),
    covered("moe_shared_expert_overlap", "When the shared expert computes"),
    refused("moe_latent_size", "Each rank holds its projections whole, which no case covers"),
    neutral("moe_grouped_gemm", "The backend decides: grouped with Transformer Engine"),
    neutral("moe_apply_probs_on_input", "Where one token is multiplied by its one probability"),
    # Routing.
    neutral("moe_router_topk", _SCORES),
    covered("moe_router_num_groups moe_router_group_topk moe_router_pre_softmax", _SCORES),
    covered("moe_router_topk_scaling_factor", _SCORES),
    covered(
        "moe_router_score_function",
        _SCORES,
        legal=("softmax", "sigmoid"),
        otherwise="No case covers 'sqrtsoftplus'",
    ),
    neutral("moe_router_dtype", "Rounding of one token's scores, the same in all layouts"),
    refused(
        "moe_router_topk_limited_devices",
        "It makes EP groups of experts, so EP would change the routing; use moe_router_num_groups "
        "and moe_router_group_topk",
    ),
    refused("moe_router_force_load_balancing", "Every rank would route at random"),
    refused("moe_enable_routing_replay", "Nothing in a training loop records or replays routes"),
    refused("moe_input_jitter_eps", "Each rank draws its own noise; with SP, for other tokens"),
    # Balance and capacity.
    covered(
        "moe_router_load_balancing_type",
        "What the balancing loss is taken over: a microbatch, or each sequence in it",
        legal=("aux_loss", "seq_aux_loss", "none"),
        otherwise="'global_aux_loss' averages over microbatches, and a data-parallel rank has "
        "others in another layout; 'sinkhorn' normalizes over the tokens that a rank holds",
        each=True,
    ),
    covered("moe_aux_loss_coeff", "Multiplies the balancing loss"),
    covered("moe_z_loss_coeff", "Multiplies a mean over tokens"),
    covered("moe_router_enable_expert_bias", "Moves with the tokens of the global batch"),
    neutral("moe_router_bias_update_rate", "Multiplies what moves the expert bias"),
    covered("moe_expert_capacity_factor", "Tokens are dropped over the whole microbatch"),
    refused(
        "moe_pad_expert_input_to_capacity moe_token_drop_policy",
        "Which rank holds a token would decide whether it is dropped",
    ),
    refused("moe_token_dropping", "Unused in Megatron-Core 0.16; use moe_expert_capacity_factor"),
    # Dispatch.
    covered(
        "moe_token_dispatcher_type",
        "How tokens reach their experts",
        legal=("allgather", "alltoall"),
        otherwise="'flex' sends tokens by DeepEP or HybridEP, which no GPU has proved here",
    ),
    refused(
        "moe_enable_deepep",
        "An old name of moe_token_dispatcher_type='flex', which no GPU has proved here",
    ),
    only_with(
        "moe_flex_dispatcher_backend moe_deepep_num_sms moe_hybridep_num_sms",
        "moe_token_dispatcher_type='flex'",
    ),
    neutral("moe_permute_fusion", "Transformer Engine's kernel for the same permutation of tokens"),
    neutral("moe_router_fusion", "Transformer Engine's kernels for the same routing and its loss"),
    refused("moe_router_padding_for_quantization", "It needs fp8 or fp4, which are refused"),
    refused("moe_router_padding_for_fp8", "It needs fp8, which is refused"),
    neutral("moe_per_layer_logging", "What Megatron's scripts log of each layer"),
    neutral("moe_layer_recompute", "An old name of recompute_modules=['moe'], which is proved"),
)

_IMPLEMENTATION = table(
    # Kernels.
    neutral(
        "transformer_impl",
        "The spec decides: Transformer Engine where it is installed, else torch",
        legal=("transformer_engine", "local"),
        otherwise=INFERENCE,
    ),
    neutral("attention_backend", "Which of Transformer Engine's attention kernels runs"),
    covered(
        "cp_comm_type",
        "How queries meet the keys and values of other CP ranks: in a ring (the default), "
        "gathered, or by exchanging tokens for heads",
        legal=("p2p", "all_gather", "a2a"),
        otherwise="'a2a+p2p' needs groups that M and R do not have, and of a list Megatron-Core "
        "0.16 gives a layer the next one's",
    ),
    neutral(
        "masked_softmax_fusion", "Only Megatron's DotProductAttention, which is not used, reads it"
    ),
    neutral(
        """bias_activation_fusion bias_dropout_fusion apply_rope_fusion fused_single_qkv_rope
        use_fused_weighted_squared_relu use_te_activation_func""",
        "A kernel for the same function",
    ),
    neutral("persist_layer_norm", "Only Megatron's FusedLayerNorm reads it"),
    refused("memory_efficient_layer_norm", "Only Megatron's FusedLayerNorm saves that memory"),
    neutral("disable_bf16_reduced_precision_matmul", "How cuBLAS rounds, on every rank alike"),
    neutral("activation_func_fp8_input_store", "A cast of one saved element"),
    neutral("disable_parameter_transpose_cache", "What Transformer Engine caches of a weight"),
    neutral("clone_scatter_output_in_embedding", "What the embedding keeps in memory"),
    neutral("config_logger_dir", "Where Megatron writes its configuration"),
    refused("batch_invariant_mode", "Mixers and experts do not give the same bits for any batch"),
    # Low precision.
    refused(
        "fp8 fp4",
        "No GPU has proved it: R's and Mamba-3's projections stay in bfloat16, and a shard's own "
        "scale is a number that the layout changes",
    ),
    only_with(
        """fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len
        fp8_amax_compute_algo fp8_wgrad fp8_dot_product_attention fp8_multi_head_attention
        tp_only_amax_red first_last_layers_bf16 num_layers_at_start_in_bf16
        num_layers_at_end_in_bf16""",
        "fp8",
    ),
    only_with("fp4_recipe fp4_param fp4_quantizer_factory", "fp4"),
    refused("quant_recipe", "It gives Transformer Engine's modules types of their own"),
    refused("use_kitchen use_kitchen_attention", "The backend is Transformer Engine or torch"),
    only_with("kitchen_attention_backend", "use_kitchen_attention"),
    # Recompute and offloading.
    covered(
        "recompute_granularity",
        "Computes activations again in the backward pass: those of whole layers, or of modules",
        legal=("full", "selective"),
    ),
    covered(
        "recompute_method",
        "Which layers recompute_granularity='full' recomputes",
        legal=("uniform", "block"),
    ),
    covered(
        "recompute_num_layers",
        "How many layers are recomputed at a time ('uniform'), or of each chunk ('block')",
    ),
    covered(
        "recompute_modules",
        "What recompute_granularity='selective' recomputes",
        legal=(
            *("core_attn", "moe", "shared_experts", "moe_act", "layernorm", "mamba", "m2rnn"),
            "mlp",
        ),
        otherwise="No block has latent attention ('mla_up_proj')",
        each=True,
    ),
    refused(
        "distribute_saved_activations",
        "It splits over TP what SP splits already; Megatron refuses it with SP, and E blocks need "
        "SP",
    ),
    refused(
        "num_microbatches_with_partial_activation_checkpoints",
        "MambaModel recomputes in every microbatch alike",
    ),
    refused("fine_grained_activation_offloading", "Only Megatron's GPTModel offloads"),
    only_with("offload_modules min_offloaded_tensor_size", "fine_grained_activation_offloading"),
    # CUDA graphs.
    refused(
        "cuda_graph_impl enable_cuda_graph external_cuda_graph",
        "A CUDA graph replays the first steps, and no GPU has proved that the stack's layers do "
        "the same in every step",
    ),
    only_with(
        """cuda_graph_scope cuda_graph_use_single_mempool cuda_graph_retain_backward_graph
        cuda_graph_warmup_steps""",
        "cuda_graph_impl",
    ),
    # Inference.
    refused(
        """symmetric_ar_type flash_decode inference_rng_tracker use_inference_optimized_layers
        inference_fuse_tp_communication mlp_chunks_for_prefill""",
        INFERENCE,
    ),
    neutral("inference_sampling_seed", "Read in inference; Megatron's scripts set it to the seed"),
)

TRANSFORMER = table(
    PARALLELISM,
    _ARCHITECTURE,
    _EXPERTS,
    _IMPLEMENTATION,
    UNTIL_0_16,
    SINCE_0_17,
    configuration="TransformerConfig",
)
"""Field -> verdict, of every supported release."""
