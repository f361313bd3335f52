"""Verdicts on what ``TransformerConfig`` says of kernels, low precision, recompute, graphs and
inference."""

from __future__ import annotations

from nemo_megacpp.settings.verdict import Table, neutral, only_with, proved, refused

_SAME_FUNCTION = "A kernel for the same function"
_INFERENCE = "The hybrid stack trains; only inference reads it"
_GRAPHS = (
    "A CUDA graph replays what the first steps did, and no GPU has proved that the stack's layers "
    "do the same in all"
)
_LOW_PRECISION = (
    "No GPU has proved it: R's and Mamba-3's projections stay in bfloat16, and a shard's own scale "
    "is a number that the layout changes"
)
_NO_FULL_RECOMPUTE = "Only the full recompute of Megatron's TransformerBlock reads it"

KERNELS: Table = {
    "transformer_impl": neutral(
        "The spec decides: Transformer Engine where it is installed, else torch",
        legal=("transformer_engine", "local"),
        otherwise=_INFERENCE,
    ),
    "attention_backend": neutral("Which of Transformer Engine's attention kernels is taken"),
    "cp_comm_type": neutral(
        "How Transformer Engine's attention exchanges keys and values; the torch backend gathers "
        "them",
        legal=("p2p", "all_gather", "a2a"),
        otherwise="'a2a+p2p' wants groups that M and R do not have, and of a list Megatron-Core "
        "0.16 gives a layer the next one's",
    ),
    "masked_softmax_fusion": neutral(
        "Only Megatron's DotProductAttention reads it, which is not in the stack"
    ),
    "bias_activation_fusion": neutral(_SAME_FUNCTION),
    "bias_dropout_fusion": neutral(_SAME_FUNCTION),
    "apply_rope_fusion": neutral(_SAME_FUNCTION),
    "fused_single_qkv_rope": neutral(_SAME_FUNCTION),
    "use_fused_weighted_squared_relu": neutral(_SAME_FUNCTION),
    "use_te_activation_func": neutral(_SAME_FUNCTION),
    "persist_layer_norm": neutral("Only Megatron's FusedLayerNorm reads it"),
    "memory_efficient_layer_norm": refused("Only Megatron's FusedLayerNorm saves that memory"),
    "disable_bf16_reduced_precision_matmul": neutral("How cuBLAS rounds, on every rank alike"),
    "activation_func_fp8_input_store": neutral("A cast of one saved element"),
    "disable_parameter_transpose_cache": neutral("What Transformer Engine keeps of a weight"),
    "clone_scatter_output_in_embedding": neutral("What the embedding keeps in memory"),
    "config_logger_dir": neutral("Where Megatron writes its configuration"),
    "batch_invariant_mode": refused(
        "It promises the same bits for any batch, of which the mixers and experts know nothing"
    ),
    "symmetric_ar_type": refused(_INFERENCE),
    # Low precision.
    "fp8": refused(_LOW_PRECISION),
    "fp8_recipe": only_with("fp8"),
    "fp8_param": only_with("fp8"),
    "fp8_quantizer_factory": only_with("fp8"),
    "fp8_margin": only_with("fp8"),
    "fp8_interval": only_with("fp8"),
    "fp8_amax_history_len": only_with("fp8"),
    "fp8_amax_compute_algo": only_with("fp8"),
    "fp8_wgrad": only_with("fp8"),
    "fp8_dot_product_attention": only_with("fp8"),
    "fp8_multi_head_attention": only_with("fp8"),
    "tp_only_amax_red": only_with("fp8"),
    "first_last_layers_bf16": only_with("fp8"),
    "num_layers_at_start_in_bf16": only_with("fp8"),
    "num_layers_at_end_in_bf16": only_with("fp8"),
    "fp4": refused(_LOW_PRECISION),
    "fp4_recipe": only_with("fp4"),
    "fp4_param": only_with("fp4"),
    "fp4_quantizer_factory": only_with("fp4"),
    "quant_recipe": refused("It gives Transformer Engine's modules types of their own"),
    "use_kitchen": refused("The backend is Transformer Engine or plain torch"),
    "use_kitchen_attention": refused("The backend is Transformer Engine or plain torch"),
    "kitchen_attention_backend": only_with("use_kitchen_attention"),
    # Recompute and offloading.
    "recompute_granularity": proved(
        "Computes activations again in the backward pass",
        "covering:TransformerConfig.recompute_granularity",
        legal=("selective",),
        otherwise="Only Megatron's TransformerBlock computes whole layers again",
    ),
    "recompute_modules": proved(
        "What recompute_granularity='selective' computes again",
        "covering:TransformerConfig.recompute_modules",
        legal=("core_attn", "moe", "shared_experts", "moe_act", "layernorm"),
        otherwise="No block has a dense MLP ('mlp') or latent attention ('mla_up_proj')",
        each=True,
    ),
    "recompute_method": refused(_NO_FULL_RECOMPUTE),
    "recompute_num_layers": refused(_NO_FULL_RECOMPUTE),
    "distribute_saved_activations": refused(_NO_FULL_RECOMPUTE),
    "fine_grained_activation_offloading": refused("Only Megatron's GPTModel offloads"),
    "offload_modules": only_with("fine_grained_activation_offloading"),
    "min_offloaded_tensor_size": only_with("fine_grained_activation_offloading"),
    # CUDA graphs.
    "cuda_graph_impl": refused(_GRAPHS),
    "enable_cuda_graph": refused(_GRAPHS),
    "external_cuda_graph": refused(_GRAPHS),
    "cuda_graph_scope": only_with("cuda_graph_impl"),
    "cuda_graph_use_single_mempool": only_with("cuda_graph_impl"),
    "cuda_graph_retain_backward_graph": only_with("cuda_graph_impl"),
    "cuda_graph_warmup_steps": only_with("cuda_graph_impl"),
    # Inference.
    "flash_decode": refused(_INFERENCE),
    "inference_rng_tracker": refused(_INFERENCE),
    "inference_sampling_seed": neutral("Read in inference; Megatron's scripts set it to the seed"),
    "use_inference_optimized_layers": refused(_INFERENCE),
    "inference_fuse_tp_communication": refused(_INFERENCE),
    "mlp_chunks_for_prefill": refused(_INFERENCE),
}
