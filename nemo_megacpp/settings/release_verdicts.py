"""Verdicts on fields that only some supported releases of Megatron-Core have. Loads no torch.

A field of another release than the installed one has a verdict too, which nothing reads:
:data:`nemo_megacpp.settings.validate.TABLES` holds the fields that are there.
"""

from __future__ import annotations

from nemo_megacpp.settings.verdict import Named, neutral, only_with, proved, refused, table

INFERENCE = "Only inference reads it, and no proof of generation covers it"
_OP_FUSER = "No GPU has proved Transformer Engine's fused operations here"

UNTIL_0_16 = table(
    refused("moe_extended_tp", "Unused in Megatron-Core 0.16; use expert_tensor_parallel_size"),
    neutral("async_tensor_model_parallel_allreduce", "Megatron-Core 0.16 no longer reads it"),
    refused("moe_use_legacy_grouped_gemm", "The backend decides which experts are built"),
)
"""Fields of ``TransformerConfig`` that 0.19 has dropped."""

SINCE_0_17 = table(
    # The axes.
    refused(
        "gtp_weight_remat_size expert_gtp_weight_remat_size",
        "Splits weights over an axis that no layout here has",
    ),
    refused(
        "tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards",
        "Any number but the tensor-parallel degree turns gtp_weight_remat_size on",
    ),
    # Set by the trainer.
    refused(
        "moe_grad_scale_func",
        "It would scale the auxiliary losses alone, and no one divides their gradients again",
    ),
    refused(
        "mtp_grad_scale_func",
        "It would scale the losses of prediction depths alone, and no one divides their gradients "
        "again",
    ),
    # Multi-token prediction.
    refused(
        "mtp_use_repeated_layer",
        "No case covers one set of weights that several prediction depths share",
    ),
    refused(
        "mtp_detach_heads",
        "Clips the gradients of prediction depths by a norm of their own, which no case covers",
    ),
    refused(
        "mtp_hybrid_override_pattern",
        "Write the prediction depths into the pattern, as in 'AEMR/AM/AM'",
    ),
    # Overlap and offloading.
    refused(
        "overlap_dispatch_backward_with_experts_wgrad",
        "Only Megatron's FSDP takes the gradients that late",
    ),
    only_with("high_priority_a2a_comm_stream", "overlap_moe_expert_parallel_comm"),
    only_with("cpu_offloading_retain_pinned_cpu_buffers", "cpu_offloading"),
    only_with(
        """delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
        activation_offload_fraction fine_grained_offloading_max_inflight_offloads""",
        "fine_grained_activation_offloading",
    ),
    refused("moe_paged_stash", "Keeps the experts' activations in pages, which no case covers"),
    only_with(
        """moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
        moe_paged_stash_buffer_size_factor_cpu""",
        "moe_paged_stash",
    ),
    # Attention.
    neutral("flash_attention_version", "Which of Transformer Engine's attention kernels runs"),
    only_with(
        """experimental_attention_variant_loss_scale_func dsa_indexer_topk_freq
        dsa_indexer_skip_topk_offset dsa_kernel_backend dsa_indexer_rope_interleaved
        dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon
        dsa_indexer_k_norm_fp32""",
        "experimental_attention_variant",
    ),
    # Widths, norms, dense matrices.
    refused(
        "use_mup",
        "Scales initial weights, logits and learning rates by widths; R and Mamba-3 do not know it",
    ),
    only_with(
        """mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult
        mup_base_head_dim mup_attn_scale_power""",
        "use_mup",
    ),
    refused("fused_residual_rmsnorm", "No GPU has proved the fused residual and norm here"),
    refused("use_transformer_engine_op_fuser use_grouped_gemm_for_dense_mlp", _OP_FUSER),
    refused("mlp_chunks_for_training", "No case covers an MLP that is computed in chunks"),
    only_with("fp8_output_proj", "fp8"),
    refused(
        "mamba_training_ssm_states_dtype",
        "No case covers states of another type than the activations",
    ),
    # Experts.
    refused(
        "use_grouped_gemm_for_shared_expert",
        "Builds another shared expert than the one that is correct under overlap_param_gather",
    ),
    only_with("moe_shared_expert_glu_interleave_size", "use_grouped_gemm_for_shared_expert"),
    refused(
        "moe_mlp_glu_interleave_size",
        "Orders the gates and units of an expert otherwise than checkpoints do",
    ),
    refused("moe_single_grouped_weight moe_single_grouped_bias", _OP_FUSER),
    only_with(
        "moe_router_quantile_balancing_ema",
        "moe_router_load_balancing_type='quantile_balancing'",
    ),
    refused("moe_router_force_biased", "Adds random numbers to the scores, for benchmarks"),
    only_with(
        """moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs
        moe_flex_dispatcher_num_sms moe_hybridep_num_blocks_permute
        moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
        moe_ncclep_static_shape moe_ncclep_zero_copy""",
        "moe_token_dispatcher_type='flex'",
    ),
    refused(
        "moe_expert_rank_capacity_factor",
        "Which rank holds an expert would decide whether a token is dropped",
    ),
    # CUDA graphs and inference.
    only_with("cuda_graph_modules", "cuda_graph_impl"),
    refused(
        """moe_pad_experts_for_cuda_graph_inference
        nccl_all_reduce_for_prefill inference_disable_triton_nvls_kernels
        inference_moe_disable_fused_quant_kernels""",
        INFERENCE,
    ),
    neutral(
        """inference_grouped_gemm_backend inference_moe_token_dispatcher_type
        inference_cuda_graph_scope""",
        INFERENCE,
    ),
)
"""Fields of ``TransformerConfig`` that 0.16 does not have."""

FSDP_ALONE = "Megatron's FSDP alone reads it, and no case varies it"
DDP_UNTIL_0_16 = only_with("preserve_fp32_weights", "use_megatron_fsdp")
"""As :data:`UNTIL_0_16`, of ``DistributedDataParallelConfig``."""

DDP_SINCE_0_17 = table(
    neutral("num_buckets", "Another way to say bucket_size, which is proved"),
    refused(
        "param_name_patterns_for_fp32_local_accumulation",
        "Gradients are accumulated in float32 whatever the name (grad_reduce_in_fp32)",
    ),
    refused("fp4_param_gather", "It needs fp4, which is refused"),
    proved(
        "megatron_fsdp_main_grads_dtype",
        "The type in which FSDP sums gradients; a bf16 model accepts torch.float32 only",
        "tests/proof/test_fsdp.py::test_bf16",
        legal=(Named("torch.float32"),),
        otherwise="Their number per rank would change a sum of fewer bits",
    ),
    refused(
        """fsdp_db_use_persist_buf_on_alloc_fail fsdp_all_gather_in_start_param_sync
        megatron_fsdp_main_params_dtype megatron_fsdp_grad_comm_dtype
        megatron_fsdp_use_decoupled_grad megatron_fsdp_cuda_graph_mode
        megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_max_pool_double_buffer""",
        FSDP_ALONE,
    ),
)
"""As :data:`SINCE_0_17`, of ``DistributedDataParallelConfig``."""

OPTIMIZER_UNTIL_0_16 = only_with("muon_use_nesterov", "optimizer='muon'")
"""As :data:`UNTIL_0_16`, of ``OptimizerConfig``."""

OPTIMIZER_SINCE_0_17 = table(
    only_with(
        """muon_nesterov muon_coefficient_type muon_scalar_optimizer adaptive_muon_moment2_method
        adaptive_muon_beta2 adaptive_muon_eps""",
        "optimizer='muon'",
    ),
    only_with("lion_beta1 lion_beta2", "optimizer='lion'"),
    only_with(
        "soap_shampoo_beta soap_precondition_frequency soap_use_kl_shampoo", "optimizer='soap'"
    ),
    refused("use_layer_wise_distributed_optimizer", "Only for optimizers that are refused"),
    refused("grad_norm_skip_threshold", "It would skip steps; clip_grad bounds the norm"),
    refused("optimizer_cuda_graph", "No GPU has proved a step of the optimizer in a CUDA graph"),
)
"""As :data:`SINCE_0_17`, of ``OptimizerConfig``."""
