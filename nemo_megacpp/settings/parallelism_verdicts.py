"""Verdicts on what ``TransformerConfig`` inherits of ``ModelParallelConfig``."""

from __future__ import annotations

from nemo_megacpp.settings.verdict import DTYPES, Table, neutral, only_with, proved, refused

_PARITY = (
    "tests/proof/test_parity.py::test_float64",
    "tests/proof/test_parity.py::test_float32_loss",
)
_TRAINER = "The trainer sets it, whatever it was before"
_P2P = "How a stage's tensors travel; the same tensors reach the same stages"
_OVERLAP = "Which of Transformer Engine's products overlap with a collective; the sums are the same"
_GPT_SCHEDULE = "Only Megatron's GPTModel has a schedule for it"
_OFFLOADING = "Only Megatron's TransformerBlock offloads"

PARALLELISM: Table = {
    # The axes.
    "tensor_model_parallel_size": proved("An axis of every proof", *_PARITY),
    "pipeline_model_parallel_size": proved("An axis of every proof", *_PARITY),
    "virtual_pipeline_model_parallel_size": proved("An axis of every proof", *_PARITY),
    "sequence_parallel": proved("An axis of every proof", *_PARITY),
    "context_parallel_size": proved("An axis of every proof", *_PARITY),
    "expert_model_parallel_size": proved("An axis of every proof", *_PARITY),
    "expert_tensor_parallel_size": proved("An axis of every proof", *_PARITY),
    "hierarchical_context_parallel_sizes": refused(
        "Only Transformer Engine's cp_comm_type='a2a+p2p' uses its groups, which M and R do not"
    ),
    "hybrid_context_parallel": refused(
        "It changes CP from one microbatch to the next; M and R are built for one CP"
    ),
    "max_seqlen_per_dp_cp_rank": only_with("hybrid_context_parallel"),
    "moe_extended_tp": refused(
        "Megatron-Core 0.16 has no code for it; expert_tensor_parallel_size is its successor"
    ),
    # The start of the weights and their type.
    "perform_initialization": neutral(
        "Whether weights get a first value; the same weights are what layouts are compared on, and "
        "False is for those that a checkpoint brings"
    ),
    "use_cpu_initialization": neutral(
        "Where first weights are drawn; layouts are compared on the same weights"
    ),
    "fp16": refused(
        "Its loss scale depends on which gradient overflows first, and its state is not in our "
        "checkpoints; bf16 needs none"
    ),
    "bf16": proved(
        "Compared within rounding", "tests/proof/test_verify.py::test_a_recipe_verified"
    ),
    "params_dtype": proved(
        "Every model is proved in float64 and float32, and within rounding in bfloat16",
        *_PARITY,
        "tests/proof/test_verify.py::test_a_recipe_verified",
        legal=DTYPES,
        otherwise="In float16 the loss would be scaled, which is proved in no layout",
    ),
    "pipeline_dtype": neutral(
        "The type in which a stage receives; another one than the stage before sends is refused",
    ),
    "enable_autocast": refused(
        "torch.autocast would choose types inside the mixers, which choose their own"
    ),
    "autocast_dtype": only_with("enable_autocast"),
    # What the trainer puts in.
    "timers": neutral("Measures time"),
    "finalize_model_grads_func": neutral(_TRAINER),
    "grad_scale_func": refused(
        "It would scale the loss of a run whose gradients nothing divides again"
    ),
    "no_sync_func": neutral(_TRAINER),
    "grad_sync_func": neutral(_TRAINER),
    "param_sync_func": neutral("The trainer sets it; it says when parameters are gathered"),
    "barrier_with_L1_time": neutral("A barrier around what is timed"),
    "use_te_rng_tracker": neutral("Who keeps the random states; seeds and forks are the same"),
    "deterministic_mode": proved(
        "Chooses kernels whose sums have one order", "covering:TransformerConfig.deterministic_mode"
    ),
    # Kernels and overlap.
    "gradient_accumulation_fusion": neutral(
        "Adds the same product to main_grad inside the kernel; needs Apex or Transformer Engine"
    ),
    "async_tensor_model_parallel_allreduce": neutral("Megatron-Core 0.16 no longer reads it"),
    "tp_comm_overlap": neutral(
        "Transformer Engine splits a product to overlap it with its collective; it sums the same "
        "numbers, and leaves out experts and the projections that are not its own"
    ),
    "tp_comm_bulk_wgrad": neutral(_OVERLAP),
    "tp_comm_bulk_dgrad": neutral(_OVERLAP),
    "tp_comm_overlap_ag": neutral(_OVERLAP),
    "tp_comm_overlap_rs": neutral(_OVERLAP),
    "tp_comm_overlap_rs_dgrad": neutral(_OVERLAP),
    "tp_comm_split_ag": neutral(_OVERLAP),
    "tp_comm_split_rs": neutral(_OVERLAP),
    "tp_comm_overlap_disable_qkv": neutral(_OVERLAP),
    "tp_comm_overlap_disable_fc1": neutral(_OVERLAP),
    "tp_comm_atomic_ag": refused(
        "Transformer Engine calls its atomic products experimental; no GPU has proved them here"
    ),
    "tp_comm_atomic_rs": refused(
        "Transformer Engine calls its atomic products experimental; no GPU has proved them here"
    ),
    "tp_comm_bootstrap_backend": neutral("How the buffers of tp_comm_overlap find each other"),
    "cross_entropy_loss_fusion": neutral(
        "The same cross entropy over the vocabulary's shards, in one kernel"
    ),
    "cross_entropy_fusion_impl": neutral("Which kernel cross_entropy_loss_fusion takes"),
    "overlap_moe_expert_parallel_comm": refused(_GPT_SCHEDULE),
    "delay_wgrad_compute": refused(_GPT_SCHEDULE),
    "ep_overlap_early_attn_memory_release": only_with("overlap_moe_expert_parallel_comm"),
    # The pipeline's messages.
    "pipeline_model_parallel_comm_backend": neutral(_P2P),
    "variable_seq_lengths": neutral("Stages tell each other shapes before they send"),
    "overlap_p2p_comm": neutral(
        "When a stage's tensors travel; HybridConfig turns it on where two stages with virtual "
        "stages need it"
    ),
    "batch_p2p_comm": neutral(_P2P),
    "batch_p2p_sync": neutral("A synchronisation of the device after a batch of messages"),
    "overlap_p2p_comm_warmup_flush": neutral("When a stage's tensors travel"),
    "microbatch_group_size_per_vp_stage": neutral(
        "When virtual stages take turns; each sees the microbatches in the same order"
    ),
    "use_ring_exchange_p2p": refused("It needs a torch of its own build, with ring_exchange"),
    "deallocate_pipeline_outputs": neutral(
        "Frees what was sent; the stack's outputs share their storage with nothing"
    ),
    "num_microbatches_with_partial_activation_checkpoints": refused(
        "Only the full recompute of Megatron's TransformerBlock takes it"
    ),
    "defer_embedding_wgrad_compute": refused("Only Megatron's GPTModel defers it"),
    "wgrad_deferral_limit": only_with("defer_embedding_wgrad_compute"),
    "mtp_standalone": only_with("mtp_num_layers"),
    # Offloading.
    "cpu_offloading": refused(_OFFLOADING),
    "cpu_offloading_num_layers": only_with("cpu_offloading"),
    "_cpu_offloading_context": refused(_OFFLOADING),
    "cpu_offloading_activations": only_with("cpu_offloading"),
    "cpu_offloading_weights": only_with("cpu_offloading"),
    "cpu_offloading_double_buffering": only_with("cpu_offloading"),
}
