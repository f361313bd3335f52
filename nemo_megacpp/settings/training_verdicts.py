"""Verdicts on ``DistributedDataParallelConfig`` and ``OptimizerConfig``."""

from __future__ import annotations

from nemo_megacpp.core.fsdp import STRATEGIES
from nemo_megacpp.settings.release_verdicts import (
    DDP_SINCE_0_17,
    DDP_UNTIL_0_16,
    FSDP_ALONE,
    OPTIMIZER_SINCE_0_17,
    OPTIMIZER_UNTIL_0_16,
)
from nemo_megacpp.settings.transformer_verdicts import TRANSFORMER
from nemo_megacpp.settings.verdict import Table, covered, neutral, only_with, proved, refused, table

_FP8 = "It needs fp8, which is refused"
_ONE_ELEMENT = "Enters the step of one element, by its own gradient alone"
_FSDP = (
    "tests/proof/test_fsdp.py::test_every_strategy",
    "tests/proof/test_fsdp.py::test_every_layout",
)
_RESUMED = "tests/nemo/test_resume.py::test_the_schedule_continues_in_another_layout"
_SCHEDULE = (
    "tests/nemo/test_lr_schedule.py::test_every_step_has_the_learning_rate_of_megatrons_script",
    _RESUMED,
)


def _as_the_model(fields: str) -> Table:
    """Return the verdicts of the ``TransformerConfig`` fields of the same names."""
    return {field: TRANSFORMER[field] for field in fields.split()}


DDP = table(
    proved(
        "grad_reduce_in_fp32",
        "The type in which gradients are summed; a bf16 model accepts True only",
        "tests/proof/test_verify.py::test_a_recipe_verified",
    ),
    covered("overlap_grad_reduce", "When gradients are summed"),
    covered("overlap_param_gather", "When parameters are gathered"),
    neutral("align_param_gather", "Whether stages gather parameters at the same time"),
    covered("use_distributed_optimizer", "Which rank holds which optimizer state"),
    refused("num_distributed_optimizer_instances", "No case and no checkpoint has several"),
    covered("bucket_size", "How many gradients one message holds"),
    neutral("pad_buckets_for_high_nccl_busbw", "Pads a message with numbers that no one reads"),
    neutral("check_for_nan_in_grad", "Ends a run whose gradients are NaN or Inf"),
    neutral("check_for_large_grads", "Ends a run whose gradients are unexpectedly large"),
    neutral("reduce_scatter_with_fp32_accumulation", "Another order of the same float32 sums"),
    neutral("average_in_collective", "Divides after the sum, not before: rounding; only NCCL can"),
    neutral("nccl_ub", "Where NCCL finds the buffers"),
    neutral("disable_symmetric_registration", "How NCCL learns where the buffers are"),
    _as_the_model("delay_wgrad_compute"),
    refused("fp8_param_gather reuse_grad_buf_for_mxfp8_param_ag", _FP8),
    proved(
        "use_megatron_fsdp",
        "Which rank holds which parameters, gradients and optimizer state; refused on "
        "Megatron-Core 0.16, through NeMo and through Megatron-Bridge",
        *_FSDP,
    ),
    proved(
        "data_parallel_sharding_strategy",
        "What FSDP shards",
        *_FSDP,
        legal=("no_shard", *STRATEGIES),
        otherwise="Megatron's FSDP has no such strategy",
    ),
    neutral("use_custom_fsdp", "The old name of use_megatron_fsdp: scripts set both, never alone"),
    refused(
        """outer_dp_sharding_strategy gradient_reduce_div_fusion
        suggested_communication_unit_size keep_fp8_transpose_cache fsdp_double_buffer
        fsdp_manual_registration""",
        FSDP_ALONE,
    ),
    DDP_UNTIL_0_16,
    DDP_SINCE_0_17,
    configuration="DistributedDataParallelConfig",
)
"""Field -> verdict, of every supported release."""

OPTIMIZER = table(
    # The step.
    proved(
        "optimizer",
        "Every proof compares a step of Adam",
        "tests/proof/test_parity.py::test_float64",
        legal=("adam",),
        otherwise="No case covers another one's step or checkpoint, and Muon would work on the "
        "part of a matrix that a rank holds",
    ),
    proved("lr", _ONE_ELEMENT, *_SCHEDULE),
    neutral("decoupled_weight_decay adam_beta2", _ONE_ELEMENT),
    proved("adam_beta1 adam_eps", _ONE_ELEMENT, _RESUMED),
    covered("weight_decay", _ONE_ELEMENT),
    proved("min_lr", "Bounds the schedule, which every rank computes alike", *_SCHEDULE),
    refused("decoupled_lr", "No case covers it"),
    only_with("decoupled_min_lr", "decoupled_lr"),
    refused("apply_wd_to_qk_layernorm", "A blocks do not normalize queries and keys"),
    covered("clip_grad", "Bounds the norm over all ranks' gradients"),
    only_with("sgd_momentum", "optimizer='sgd'"),
    only_with(
        """muon_momentum muon_split_qkv muon_scale_mode muon_fp32_matmul_prec
        muon_num_ns_steps muon_tp_mode muon_extra_scale_factor""",
        "optimizer='muon'",
    ),
    # Precision.
    _as_the_model("bf16 fp16 params_dtype"),
    neutral(
        "fp8_recipe",
        "Read only for parameters in fp8, which is refused; NeMo and Megatron's scripts set "
        "'delayed'",
        legal=("delayed",),
        otherwise=_FP8,
    ),
    refused("reuse_grad_buf_for_mxfp8_param_ag", _FP8),
    refused(
        """use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype
        exp_avg_sq_dtype""",
        "No case and no checkpoint has moments or master weights of fewer bits",
    ),
    only_with("store_param_remainders", "use_precision_aware_optimizer"),
    refused("loss_scale", "NeMo divides gradients by it and does not multiply the loss"),
    only_with("initial_loss_scale min_loss_scale loss_scale_window hysteresis", "fp16"),
    # Where the state is.
    proved(
        "use_distributed_optimizer",
        "Which rank holds which optimizer state",
        "covering:DistributedDataParallelConfig.use_distributed_optimizer",
    ),
    neutral("overlap_param_gather", "Read only with fp8; the wrapper's own setting counts"),
    refused(
        "overlap_param_gather_with_optimizer_step",
        "It makes an optimizer of the first chunk alone, which no case or checkpoint covers",
    ),
    refused("optimizer_cpu_offload", "No case and no checkpoint covers its optimizer"),
    only_with(
        """optimizer_offload_fraction use_torch_optimizer_for_cpu_offload
        overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params""",
        "optimizer_cpu_offload",
    ),
    # What is logged.
    neutral("log_num_zeros_in_grad", "Counts, and changes nothing"),
    _as_the_model("barrier_with_L1_time timers config_logger_dir"),
    OPTIMIZER_UNTIL_0_16,
    OPTIMIZER_SINCE_0_17,
    configuration="OptimizerConfig",
)
"""Field -> verdict, of every supported release."""
