"""Every setting at every door: refused ones with the reason, the others let through."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from torch.nn import functional as F

import nemo_megacpp.megatron_args
from nemo_megacpp.config import HybridConfig
from nemo_megacpp.errors import UserError
from nemo_megacpp.nemo.actual import validate_training
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.settings.script import validate_script
from nemo_megacpp.settings.validate import TABLES, default_of, setting_violations
from nemo_megacpp.settings.verdict import Setting

_OPTIONS = Path(nemo_megacpp.megatron_args.__file__).with_name("options_0.16.json")
_OTHER: dict[type, Any] = {int: 7, float: 0.25, str: "other", torch.dtype: torch.float16}


def _fields(kind: type) -> list[dataclasses.Field[Any]]:
    return list(dataclasses.fields(kind))


def _illegal(kind: type, field: dataclasses.Field[Any]) -> Any:
    """Return a value that is not the default and not legal."""
    default = default_of(field)
    if isinstance(default, bool):
        return not default
    hint = get_type_hints(kind)[field.name]
    options = [hint, *get_args(hint)] if get_origin(hint) is not None else [hint]
    for value in (literal for option in options for literal in _literals(option)):
        if not TABLES[kind][field.name].accepts(value, default):
            return value
    for option, value in _OTHER.items():
        if option in options and value != default:
            return value
    return "other"


def _verdicts(kind: type, *wanted: str) -> list[Any]:
    return [
        pytest.param(field, TABLES[kind][field.name], id=field.name)
        for field in _fields(kind)
        if TABLES[kind][field.name].verdict in wanted
    ]


def _limited(kind: type) -> list[Any]:
    return [
        pytest.param(field, TABLES[kind][field.name], id=field.name)
        for field in _fields(kind)
        if TABLES[kind][field.name].verdict == "refused" or TABLES[kind][field.name].legal
    ]


def _words(setting: Setting) -> str:
    return setting.otherwise or setting.reason


# --- the model


@pytest.mark.parametrize(("field", "setting"), _limited(TransformerConfig))
def test_a_refused_setting_of_the_model(field: dataclasses.Field[Any], setting: Setting) -> None:
    value = _illegal(TransformerConfig, field)
    with pytest.raises(UserError) as refusal:
        HybridConfig(**tiny_model("AEMR", **{field.name: value}))
    message = str(refusal.value)
    assert f"{field.name}={value!r}: {_words(setting)}. Legal: " in message


_TRIED: dict[str, Any] = {
    "moe_router_load_balancing_type": ["aux_loss", "none"],
    "recompute_granularity": "full",
    "recompute_modules": ["moe"],
}
"""One value of settings whose values are lists, or want different others."""
_BESIDE: dict[str, dict[str, Any]] = {
    "sequence_parallel": {"tensor_model_parallel_size": 2},
    "recompute_granularity": {"recompute_method": "uniform", "recompute_num_layers": 1},
    "recompute_method": {"recompute_granularity": "full", "recompute_num_layers": 1},
    "recompute_num_layers": {"recompute_granularity": "full", "recompute_method": "block"},
    "recompute_modules": {"recompute_granularity": "selective"},
    "moe_router_load_balancing_type": {"moe_aux_loss_coeff": [0.1, 0.2]},
    "overlap_p2p_comm_warmup_flush": {"overlap_p2p_comm": True, "batch_p2p_comm": False},
    "add_bias_linear": {"hybrid_pattern": "AM"},
    "moe_apply_probs_on_input": {"moe_router_topk": 1},
    "use_te_activation_func": {"activation_func": F.silu},
    "calculate_per_token_loss": {"hybrid_pattern": "AEM"},
    "moe_router_score_function": {"moe_router_enable_expert_bias": False},
}
"""What a setting wants of others."""
_NEEDS = {
    "apply_rope_fusion": "install TE",
    "moe_permute_fusion": "fused_permute",
    "fp8_param": "must be used together with fp8",
    "fp4_param": "must be used together with fp4",
    "ep_overlap_early_attn_memory_release": "overlap_moe_expert_parallel_comm must be enabled",
}
"""Settings that Megatron refuses by itself where something is not there."""


@pytest.mark.parametrize(("field", "setting"), _verdicts(TransformerConfig, "proved", "neutral"))
def test_other_settings_of_the_model_can_be_built(
    field: dataclasses.Field[Any], setting: Setting
) -> None:
    default = getattr(HybridConfig, field.name, None)
    hint = get_type_hints(TransformerConfig)[field.name]
    if field.name in _TRIED:
        values: list[Any] = [_TRIED[field.name]]
    elif setting.legal is not None:
        values = list(setting.legal)
    elif isinstance(default, bool):
        values = [not default]
    elif isinstance(default, AttnBackend):
        values = list(AttnBackend)
    else:
        values = [value for option in (hint, *get_args(hint)) for value in _literals(option)]
    if field.name in _NEEDS:
        with pytest.raises((AssertionError, ImportError, ValueError), match=_NEEDS[field.name]):
            HybridConfig(**tiny_model("AEMR", **{field.name: True}))
        return
    for value in values:
        beside = dict(_BESIDE.get(field.name, {}))
        pattern = beside.pop("hybrid_pattern", "AEMR")
        config = HybridConfig(**tiny_model(pattern, **{**beside, field.name: value}))
        assert getattr(config, field.name) == value


def _literals(hint: Any) -> list[Any]:
    return [value for value in get_args(hint) if isinstance(value, str)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"moe_router_load_balancing_type": "global_aux_loss"},
            r"'global_aux_loss' averages over microbatches",
        ),
        (
            {
                "moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"],
                "moe_aux_loss_coeff": [0.1, 0.1],
            },
            r"Legal: 'aux_loss', 'seq_aux_loss', 'none', or a list of these\.",
        ),
        ({"moe_token_drop_policy": "position"}, r"Which rank holds a token would decide"),
        ({"moe_apply_probs_on_input": True}, r"moe_router_topk=2"),
        (
            {"bias_activation_fusion": True, "activation_func": F.gelu},
            r"only silu with a gate",
        ),
        (
            {"bias_activation_fusion": True, "activation_func_clamp_value": 7.0},
            r"activation_func_clamp_value=7\.0 would be ignored with bias_activation_fusion=True",
        ),
        (
            {"moe_shared_expert_overlap": True, "activation_func_clamp_value": 7.0},
            r"would be ignored with moe_shared_expert_overlap=True",
        ),
        (
            {"gated_linear_unit": False, "glu_linear_offset": 1.0},
            r"glu_linear_offset=1\.0 would be ignored with gated_linear_unit=False",
        ),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.bfloat16},
            r"a stage computes and sends torch\.float32",
        ),
        (
            {
                "pipeline_model_parallel_size": 4,
                "virtual_pipeline_model_parallel_size": 2,
                "pipeline_dtype": torch.float32,
                "variable_seq_lengths": True,
            },
            r"with PP = 4 and VPP = 2: stages send each other shapes",
        ),
    ],
)
def test_refused_beside_others(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HybridConfig(**tiny_model("AEMR", **changes))


# --- the wrapper and the optimizer, through NeMo and through Megatron's scripts


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The arguments of the Megatron script that this process then seems to run."""
    options = json.loads(_OPTIONS.read_text(encoding="utf-8"))
    args = SimpleNamespace(**{option["dest"]: option["default"] for option in options.values()})
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        setattr(args, name, torch.float32)  # as the script reads 'fp32'
    args.params_dtype = torch.float32
    module = SimpleNamespace(get_args=lambda: args)
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", module)
    return args


_IN_SCRIPTS = {
    "grad_reduce_in_fp32": "accumulate_allreduce_grads_in_fp32",
    "average_in_collective": "ddp_average_in_collective",
}


@pytest.mark.parametrize(("field", "setting"), _limited(DistributedDataParallelConfig))
def test_a_refused_setting_of_the_wrapper(
    field: dataclasses.Field[Any], setting: Setting, script: SimpleNamespace
) -> None:
    from nemo_megacpp.nemo.strategy import HybridStrategy

    value = _illegal(DistributedDataParallelConfig, field)
    config = DistributedDataParallelConfig()
    setattr(config, field.name, value)  # past Megatron's own checks
    message = f"DistributedDataParallelConfig.{field.name}={value!r}: {_words(setting)}. Legal: "
    with pytest.raises(UserError) as refusal:
        HybridStrategy(ddp=config)
    assert message in str(refusal.value)
    model = HybridConfig(**tiny_model("AEMR"))
    with pytest.raises(UserError) as refusal:
        validate_training(model, config, None)
    assert message in str(refusal.value)
    setattr(script, field.name, value)
    with pytest.raises(UserError) as refusal:
        validate_script(model)
    assert message in str(refusal.value)


@pytest.mark.parametrize(("field", "setting"), _limited(OptimizerConfig))
def test_a_refused_setting_of_the_optimizer(
    field: dataclasses.Field[Any], setting: Setting, script: SimpleNamespace
) -> None:
    from nemo_megacpp.nemo.hybrid_optimizer import HybridOptimizer

    value = _illegal(OptimizerConfig, field)
    config = OptimizerConfig()
    setattr(config, field.name, value)
    message = f"OptimizerConfig.{field.name}={value!r}: {_words(setting)}. Legal: "
    with pytest.raises(UserError) as refusal:
        HybridOptimizer(config)
    assert message in str(refusal.value)
    model = HybridConfig(**tiny_model("AEMR"))
    with pytest.raises(UserError) as refusal:
        validate_training(model, DistributedDataParallelConfig(), SimpleNamespace(config=config))
    assert message in str(refusal.value)
    setattr(script, field.name, value)
    with pytest.raises(UserError) as refusal:
        validate_script(model)
    if field.name not in TABLES[DistributedDataParallelConfig]:  # else one argument sets both
        assert message in str(refusal.value)


@pytest.mark.parametrize("kind", [DistributedDataParallelConfig, OptimizerConfig])
def test_other_settings_are_let_through(kind: type) -> None:
    for field in _fields(kind):
        setting, default = TABLES[kind][field.name], default_of(field)
        for value in setting.legal or ([not default] if isinstance(default, bool) else [default]):
            if setting.verdict != "refused":
                assert not list(setting_violations(kind, {field.name: value}))


def test_a_script_with_its_usual_arguments(script: SimpleNamespace) -> None:
    validate_script(HybridConfig(**tiny_model("AEMR")))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_torch_fsdp2", True),
        ("use_megatron_fsdp", True),
        ("dataloader_inter_document_masking", True),
        ("logits_load_dir", "logits"),
    ],
)
def test_a_script_with_an_argument_that_no_case_covers(
    script: SimpleNamespace, name: str, value: object
) -> None:
    setattr(script, name, value)
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}|{name}=True"):
        validate_script(HybridConfig(**tiny_model("AEMR")))


@pytest.mark.parametrize("name", ["eod_mask_loss", "sft"])
def test_a_script_with_masks_that_are_uneven_over_cp(script: SimpleNamespace, name: str) -> None:
    """Its loss function divides by the unmasked tokens of one context-parallel rank."""
    model = tiny_model("AEM", seq_length=32)
    setattr(script, name, True)
    validate_script(HybridConfig(**model))
    validate_script(HybridConfig(**model, context_parallel_size=2, calculate_per_token_loss=True))
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} with CP=2: .*per-token-loss"):
        validate_script(HybridConfig(**model, context_parallel_size=2))


def test_a_script_without_arguments_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_args() -> None:
        raise AssertionError("args is not initialized.")

    module = SimpleNamespace(get_args=get_args)
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", module)
    validate_script(HybridConfig(**tiny_model("AEMR")))


@pytest.mark.parametrize(
    ("model", "ddp", "optimizer", "message"),
    [
        (
            {"bf16": True},
            {},
            {"bf16": True},
            r"grad_reduce_in_fp32=False: in bf16 .* Legal: True\.",
        ),
        (
            {"hybrid_pattern": "AM", "calculate_per_token_loss": True},
            {"average_in_collective": True},
            {},
            r"average_in_collective=True: .* Legal: False\.",
        ),
        (
            {},
            {"overlap_param_gather": True, "overlap_grad_reduce": True},
            {},
            r"overlap_param_gather=True with use_distributed_optimizer=False: Megatron gathers",
        ),
        ({}, {}, {"bf16": True}, r"OptimizerConfig\.bf16=True, and the model has bf16=False"),
        (
            {},
            {"data_parallel_sharding_strategy": "optim"},
            {},
            r"data_parallel_sharding_strategy='optim' has no effect without use_megatron_fsdp",
        ),
        ({}, {"use_custom_fsdp": True}, {}, r"use_custom_fsdp=True: it is use_megatron_fsdp"),
    ],
)
def test_refused_together(
    model: dict[str, Any], ddp: dict[str, Any], optimizer: dict[str, Any], message: str
) -> None:
    config = HybridConfig(**{**tiny_model("AEMR"), **model})
    optim = SimpleNamespace(config=OptimizerConfig(**optimizer))
    with pytest.raises(UserError, match=message):
        validate_training(config, DistributedDataParallelConfig(**ddp), optim)


def test_a_strategy_has_settings_of_its_own_that_are_the_wrappers() -> None:
    from nemo_megacpp.nemo.strategy import HybridStrategy

    with pytest.raises(UserError, match="num_distributed_optimizer_instances=2"):
        HybridStrategy(num_distributed_optimizer_instances=2)
    with pytest.raises(UserError, match=r"trainer\.strategy\.ddp='pytorch'"):
        HybridStrategy(ddp="pytorch")


@pytest.mark.parametrize(
    ("name", "value"), [("scale_lr_cond", bool), ("no_weight_decay_cond", bool), ("lr_mult", 0.5)]
)
def test_what_the_optimizer_module_would_drop(name: str, value: Any) -> None:
    from nemo_megacpp.nemo.hybrid_optimizer import HybridOptimizer

    with pytest.raises(UserError, match=rf"optim\.{name}=.*no longer takes it"):
        HybridOptimizer(OptimizerConfig(), **{name: value})


class _Plugin:
    """What a precision plugin says: it has the last word in all three configurations."""

    def __init__(self, **said: Any):
        from nemo.lightning.pytorch.plugins.mixed_precision import MegatronMixedPrecision

        self.dtype_config = MegatronMixedPrecision(**said).dtype_config


def _connect(monkeypatch: pytest.MonkeyPatch, plugin: _Plugin | None, optim: Any) -> None:
    """Connect NeMo's strategy and a model, as a trainer does before it starts the groups."""
    from lightning.pytorch.strategies import DDPStrategy

    from nemo_megacpp.nemo import strategy as module

    monkeypatch.setattr(module, "validate_actual", lambda *_: None)
    monkeypatch.setattr(module, "actual_layout", lambda *_: None)
    monkeypatch.setattr(DDPStrategy, "connect", lambda *_: None)
    strategy = module.HybridStrategy(
        ddp=DistributedDataParallelConfig(grad_reduce_in_fp32=True), ckpt_async_save=False
    )
    strategy._precision_plugin = plugin
    trainer = SimpleNamespace(world_size=1, num_devices=1, num_nodes=1, datamodule=None)
    config = HybridConfig(**tiny_model("AEMR"))
    strategy.connect(SimpleNamespace(trainer=trainer, config=config, optim=optim))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"precision": "bf16-mixed", "params_dtype": torch.bfloat16}, ""),
        ({"precision": "16-mixed"}, "fp16=True: Its loss scale"),
        ({"precision": "bf16-mixed", "fp8": "hybrid"}, "fp8='hybrid': No GPU has proved it"),
        ({"precision": "bf16-mixed", "grad_reduce_in_fp32": False}, "grad_reduce_in_fp32=False"),
        ({"precision": "bf16-mixed", "fp16_loss_scale": 64.0}, "loss_scale=64.0: NeMo divides"),
    ],
)
def test_what_a_precision_plugin_says(
    said: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_megacpp.nemo.hybrid_optimizer import HybridOptimizer

    optim = HybridOptimizer(OptimizerConfig(lr=1e-3))
    if not message:
        _connect(monkeypatch, _Plugin(**said), optim)
        return
    with pytest.raises(UserError, match=message):
        _connect(monkeypatch, _Plugin(**said), optim)


def test_another_optimizer_module(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo.lightning import MegatronOptimizerModule

    with pytest.raises(UserError, match="optim is a MegatronOptimizerModule"):
        _connect(monkeypatch, None, MegatronOptimizerModule(OptimizerConfig(lr=1e-3)))


# --- another Megatron-Core


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.__name__)
def test_a_setting_without_a_verdict(kind: type) -> None:
    other = dataclasses.make_dataclass(kind.__name__, [("novelty", int, 3)])
    TABLES[other] = {}
    try:
        assert not list(setting_violations(other, {"novelty": 3}))
        (found,) = setting_violations(other, {"novelty": 4})
        assert found.startswith(f"{kind.__name__}.novelty=4: ") and found.endswith("Legal: 3.")
    finally:
        del TABLES[other]
