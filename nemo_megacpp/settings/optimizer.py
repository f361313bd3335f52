"""Verdicts on ``OptimizerConfig``."""

from __future__ import annotations

from nemo_megacpp.settings.verdict import (
    DTYPES,
    Setting,
    Table,
    neutral,
    only_with,
    proved,
    refused,
)

_ONE_ELEMENT = "Enters the step of one element, by its own gradient alone"
_RESUMED = "tests/nemo/test_resume.py::test_the_schedule_continues_in_another_layout"
_SCHEDULE = (
    "tests/nemo/test_lr_schedule.py::test_every_step_has_the_learning_rate_of_megatrons_script",
    _RESUMED,
)
_FP16 = only_with("fp16")
_MUON = only_with("optimizer='muon'")
_OFFLOAD = only_with("optimizer_cpu_offload")
_LOW_MOMENTS = "No case has moments or master weights in fewer bits, and no checkpoint of ours"


def _covered(reason: str, field: str) -> Setting:
    return proved(reason, f"covering:OptimizerConfig.{field}")


OPTIMIZER: Table = {
    # The step.
    "optimizer": proved(
        "Every proof compares a step of Adam",
        "tests/proof/test_parity.py::test_float64",
        legal=("adam",),
        otherwise="No case has a step or a checkpoint of another one, and Muon would work on the "
        "part of a matrix that a rank happens to hold",
    ),
    "lr": proved(_ONE_ELEMENT, *_SCHEDULE),
    "min_lr": proved("Bounds the schedule, which every rank computes alike", *_SCHEDULE),
    "decoupled_lr": refused("No case has it"),
    "decoupled_min_lr": only_with("decoupled_lr"),
    "weight_decay": _covered(_ONE_ELEMENT, "weight_decay"),
    "decoupled_weight_decay": neutral(_ONE_ELEMENT),
    "apply_wd_to_qk_layernorm": refused("A blocks have no norm of queries and keys"),
    "adam_beta1": proved(_ONE_ELEMENT, _RESUMED),
    "adam_beta2": neutral(_ONE_ELEMENT),
    "adam_eps": proved(_ONE_ELEMENT, _RESUMED),
    "clip_grad": _covered("Bounds the norm over all ranks' gradients", "clip_grad"),
    "sgd_momentum": only_with("optimizer='sgd'"),
    "muon_momentum": _MUON,
    "muon_split_qkv": _MUON,
    "muon_use_nesterov": _MUON,
    "muon_scale_mode": _MUON,
    "muon_fp32_matmul_prec": _MUON,
    "muon_num_ns_steps": _MUON,
    "muon_tp_mode": _MUON,
    "muon_extra_scale_factor": _MUON,
    # Precision.
    "bf16": proved(
        "Compared within rounding", "tests/proof/test_verify.py::test_a_recipe_verified"
    ),
    "fp16": refused(
        "Its loss scale depends on which gradient overflows first, and its state is not in our "
        "checkpoints; bf16 needs none"
    ),
    "params_dtype": proved(
        "Every model is proved in float64 and float32, and within rounding in bfloat16",
        "tests/proof/test_parity.py::test_float64",
        "tests/proof/test_verify.py::test_a_recipe_verified",
        legal=DTYPES,
        otherwise="In float16 the loss would be scaled, which is proved in no layout",
    ),
    "fp8_recipe": neutral(
        "Read only for parameters in fp8, which is refused; NeMo and Megatron's scripts set "
        "'delayed'",
        legal=("delayed",),
        otherwise="It needs fp8, which is refused",
    ),
    "reuse_grad_buf_for_mxfp8_param_ag": refused("It needs fp8, which is refused"),
    "use_precision_aware_optimizer": refused(_LOW_MOMENTS),
    "store_param_remainders": only_with("use_precision_aware_optimizer"),
    "main_grads_dtype": refused(_LOW_MOMENTS),
    "main_params_dtype": refused(_LOW_MOMENTS),
    "exp_avg_dtype": refused(_LOW_MOMENTS),
    "exp_avg_sq_dtype": refused(_LOW_MOMENTS),
    "loss_scale": refused("NeMo divides gradients by it and does not multiply the loss"),
    "initial_loss_scale": _FP16,
    "min_loss_scale": _FP16,
    "loss_scale_window": _FP16,
    "hysteresis": _FP16,
    # Where the state is.
    "use_distributed_optimizer": proved(
        "Which rank keeps which optimizer state",
        "covering:DistributedDataParallelConfig.use_distributed_optimizer",
    ),
    "overlap_param_gather": neutral(
        "Read only with fp8; DistributedDataParallelConfig has the setting that counts"
    ),
    "overlap_param_gather_with_optimizer_step": refused(
        "It makes an optimizer of the first chunk alone, which no case and no checkpoint has"
    ),
    "optimizer_cpu_offload": refused("No case has its optimizer, and no checkpoint of ours"),
    "optimizer_offload_fraction": _OFFLOAD,
    "use_torch_optimizer_for_cpu_offload": _OFFLOAD,
    "overlap_cpu_optimizer_d2h_h2d": _OFFLOAD,
    "pin_cpu_grads": _OFFLOAD,
    "pin_cpu_params": _OFFLOAD,
    # What is logged.
    "log_num_zeros_in_grad": neutral("Counts, and changes nothing"),
    "barrier_with_L1_time": neutral("A barrier around what is timed"),
    "timers": neutral("Measures time"),
    "config_logger_dir": neutral("Where Megatron writes its configuration"),
}
