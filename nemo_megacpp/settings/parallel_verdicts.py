"""Verdicts on the fields of ``ModelParallelConfig``. Loads no torch."""

from __future__ import annotations

from nemo_megacpp.settings.verdict import (
    DTYPES,
    covered,
    neutral,
    only_with,
    proved,
    refused,
    table,
)

_PARITY = (
    "tests/proof/test_parity.py::test_float64",
    "tests/proof/test_parity.py::test_float32_loss",
)
_VERIFIED = "tests/proof/test_verify.py::test_a_recipe_verified"

PREDICTION = (
    "tests/proof/test_prediction.py::test_float64",
    "tests/proof/test_prediction.py::test_float32_loss",
)

PARALLELISM = table(
    # The axes.
    proved(
        """tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel
        virtual_pipeline_model_parallel_size context_parallel_size expert_model_parallel_size
        expert_tensor_parallel_size""",
        "An axis of every proof",
        *_PARITY,
    ),
    refused(
        "hierarchical_context_parallel_sizes",
        "Only Transformer Engine's cp_comm_type='a2a+p2p' uses its groups; M and R do not",
    ),
    refused("hybrid_context_parallel", "Changes CP between microbatches; M and R need one CP"),
    only_with("max_seqlen_per_dp_cp_rank", "hybrid_context_parallel"),
    # Initialization and data types.
    neutral(
        """perform_initialization use_cpu_initialization is_hybrid_model init_method
        output_layer_init_method init_method_std embedding_init_method embedding_init_method_std""",
        "Initializes weights; layouts are compared on the same weights",
    ),
    refused(
        "fp16",
        "Its loss scale depends on which gradient overflows first, and this package's checkpoints "
        "do not hold its state; use bf16",
    ),
    proved("bf16", "Compared within rounding", _VERIFIED),
    proved(
        "params_dtype",
        "Every model is proved in float64 and float32, and within rounding in bfloat16",
        *_PARITY,
        _VERIFIED,
        legal=DTYPES,
        otherwise="No layout is proved with the loss scaling that float16 needs",
    ),
    neutral("pipeline_dtype", "The type that a stage receives; another than is sent is refused"),
    refused("enable_autocast", "torch.autocast would override the types that mixers choose"),
    only_with("autocast_dtype", "enable_autocast"),
    # Set by the trainer.
    neutral("timers", "Measures time"),
    neutral("finalize_model_grads_func no_sync_func grad_sync_func", "The trainer overwrites it"),
    refused("grad_scale_func", "It would scale the loss, and no one divides the gradients again"),
    neutral("param_sync_func", "The trainer sets it; it says when parameters are gathered"),
    neutral("barrier_with_L1_time", "A barrier around what is timed"),
    neutral("use_te_rng_tracker", "Who keeps the random states; seeds and forks are the same"),
    covered("deterministic_mode", "Selects kernels that sum in one order"),
    # Fused kernels and overlap.
    neutral("gradient_accumulation_fusion", "Adds the same product to main_grad in the kernel"),
    neutral(
        "tp_comm_overlap",
        "Transformer Engine splits a product to overlap it with its collective; it sums the same "
        "numbers, and skips experts and the projections that are not its own",
    ),
    neutral(
        """tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs tp_comm_overlap_disable_qkv
        tp_comm_overlap_disable_fc1""",
        "Which of Transformer Engine's products overlap with a collective; the sums are the same",
    ),
    refused(
        "tp_comm_atomic_ag tp_comm_atomic_rs",
        "Transformer Engine calls its atomic products experimental; no GPU has proved them here",
    ),
    neutral("tp_comm_bootstrap_backend", "How the buffers of tp_comm_overlap find each other"),
    neutral("cross_entropy_loss_fusion", "The same vocab-parallel cross entropy, in one kernel"),
    neutral("cross_entropy_fusion_impl", "Which kernel cross_entropy_loss_fusion takes"),
    refused(
        "overlap_moe_expert_parallel_comm delay_wgrad_compute",
        "Only Megatron's GPTModel has a schedule for it",
    ),
    only_with("ep_overlap_early_attn_memory_release", "overlap_moe_expert_parallel_comm"),
    # Pipeline communication.
    neutral(
        "pipeline_model_parallel_comm_backend batch_p2p_comm",
        "How a stage's tensors are sent; the same tensors reach the same stages",
    ),
    neutral(
        "variable_seq_lengths",
        "Stages send each other shapes before tensors; refused with virtual stages on more than "
        "two stages, which would wait for each other",
    ),
    neutral(
        "overlap_p2p_comm",
        "When a stage's tensors are sent; HybridConfig turns it on for two stages with virtual "
        "stages, which need it",
    ),
    neutral("batch_p2p_sync", "Synchronizes the device after a batch of messages"),
    neutral("overlap_p2p_comm_warmup_flush", "When a stage's tensors are sent"),
    neutral(
        "microbatch_group_size_per_vp_stage",
        "When virtual stages take turns; each sees the microbatches in the same order",
    ),
    refused("use_ring_exchange_p2p", "Needs a custom build of torch, with ring_exchange"),
    neutral("deallocate_pipeline_outputs", "Frees what was sent; nothing shares its storage"),
    refused("defer_embedding_wgrad_compute", "Only Megatron's GPTModel defers it"),
    only_with("wgrad_deferral_limit", "defer_embedding_wgrad_compute"),
    refused("mtp_standalone", "Megatron's hybrid model builds no stage of prediction depths alone"),
    proved(
        "mtp_loss_scaling_factor",
        "The weight of the losses of the prediction depths, which are averaged over a microbatch",
        *PREDICTION,
    ),
    refused("cpu_offloading _cpu_offloading_context", "Only Megatron's TransformerBlock offloads"),
    only_with(
        """cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights
        cpu_offloading_double_buffering""",
        "cpu_offloading",
    ),
)
"""Field -> verdict."""
