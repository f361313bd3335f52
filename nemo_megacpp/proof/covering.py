"""The covering list: every setting that a proof varies, in every layout that it is legal in.

A full product would be thousands of runs. Settings that can be on together share a bundle, and
every bundle is run in every layout of :data:`LAYOUTS`: each pair of a setting and an axis is in at
least one case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

from torch.nn import functional as F

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import Dtype, StepSpec

_WITHOUT_SP = "TP without SP"

LAYOUTS: Mapping[str, str] = MappingProxyType(
    {
        "TP": "tp=2,etp=2",
        _WITHOUT_SP: "tp=2,sp=false",
        "ETP": "tp=2,etp=1",
        "CP": "cp=2",
        "EP": "ep=2",
        "DP": "world=2",
        "PP": "pp=2",
        "VPP": "pp=2,vpp=2",
        "together": "tp=2,cp=2,ep=2,etp=1",
    }
)
"""Axis -> a layout that moves it."""
_PATTERNS = {_WITHOUT_SP: "AMRF", "PP": "AE|MRF"}
_PATTERN = "A|E|M|RF"
"""All families, in as many pipeline chunks as VPP has; other axes ignore the cuts."""


@dataclass(frozen=True)
class Varied:
    """One setting with another value than the suite's usual one.

    Attributes:
        name: of the setting, in plain words.
        model: fields of ``HybridConfig``.
        ddp, optimizer: fields of Megatron's ``DistributedDataParallelConfig``, ``OptimizerConfig``.
        spec: fields of :class:`StepSpec`.
        dtype: what a case of it runs in: ``float64`` takes one step through a linear form of the
            logits, ``float32`` three steps of Adam with clipping through the cross entropy, and
            ``bfloat16`` one step through the cross entropy, held to measured rounding.
        pattern: blocks that the model must have; None for all families.
        axes: where layouts agree with it; None for everywhere.
        apart: names of settings that cannot be on together with it.
    """

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    ddp: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    dtype: Dtype = "float64"
    pattern: str | None = None
    axes: tuple[str, ...] | None = None
    apart: tuple[str, ...] = field(default=())

    @property
    def is_of_experts(self) -> bool:
        """Whether only E blocks read it."""
        named = [*self.model, *self.model.get("recompute_modules", ()), *self.spec]
        return any(name.startswith(("moe", "shared_experts", "starved")) for name in named)

    def is_legal_on(self, axis: str) -> bool:
        """Whether a layout of ``axis`` accepts it; without SP, Megatron's E block refuses TP."""
        if axis == _WITHOUT_SP and self.is_of_experts:
            return False
        return self.axes is None or axis in self.axes

    def goes_with(self, other: Varied) -> bool:
        """Return whether both can be on in one model."""
        if (self.dtype, self.pattern, self.axes) != (other.dtype, other.pattern, other.axes):
            return False
        if self.name in other.apart or other.name in self.apart:
            return False
        mine = {**self.model, **self.ddp, **self.optimizer, **self.spec}
        others = {**other.model, **other.ddp, **other.optimizer, **other.spec}
        return all(mine[name] == others[name] for name in mine.keys() & others.keys())


def _model(name: str, *apart: str, **fields: Any) -> Varied:
    return Varied(name, model=fields, apart=apart)


_SHARDED = {"use_distributed_optimizer": True}
_SELECTIVE: dict[str, Any] = {"recompute_granularity": "selective"}
_FULL: dict[str, Any] = {"recompute_granularity": "full"}

SETTINGS: tuple[Varied, ...] = (
    # The batch and the loss.
    Varied("two rows a microbatch", spec={"micro_batch_size": 2, "global_batch_size": 8}),
    Varied("uneven loss mask", spec={"loss_mask": "uneven"}),
    Varied(
        "packed documents",
        model={"mode": "mamba3", "seq_length": 32},
        spec={"documents": (16, 4, 12)},
        apart=("two rows a microbatch", "capacity"),
    ),
    _model(
        "loss per token",
        calculate_per_token_loss=True,
        m2rnn_state_gradient_clip=None,
    ),
    # Routing.
    _model("aux_loss", moe_router_load_balancing_type="aux_loss"),
    _model("no balancing", moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0),
    _model(
        "two balancing losses",
        moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"],
        moe_aux_loss_coeff=[0.01, 0.02],
    ),
    _model("z loss", moe_z_loss_coeff=1e-3),
    _model(
        "softmax after top-k",
        moe_router_score_function="softmax",
        moe_router_enable_expert_bias=False,
        moe_router_pre_softmax=False,
    ),
    _model(
        "softmax before top-k",
        moe_router_score_function="softmax",
        moe_router_enable_expert_bias=False,
        moe_router_pre_softmax=True,
        moe_router_topk_scaling_factor=2.5,
    ),
    _model("group top-k", moe_router_num_groups=4, moe_router_group_topk=2),
    _model("capacity", moe_expert_capacity_factor=0.75),
    _model("allgather", moe_token_dispatcher_type="allgather"),
    _model("shared expert gate", moe_shared_expert_gate=True),
    _model("shared expert overlap", "allgather", moe_shared_expert_overlap=True),
    Varied(  # by the expert bias, which a softmax router has not
        "starved experts",
        model={"moe_router_enable_expert_bias": True},
        spec={"starved_experts": (0, 1, 5)},
    ),
    # Blocks.
    _model("tied embeddings", share_embeddings_and_output_weights=True),
    _model("attention output gate", attention_output_gate=True),
    _model("qkv bias", add_qkv_bias=True),
    _model("softmax scale", softmax_scale=0.3),
    _model("kv_channels", kv_channels=8),
    _model("ring of keys and values", cp_comm_type="p2p"),
    _model("gathered keys and values", cp_comm_type="all_gather"),
    _model("tokens exchanged for heads", cp_comm_type="a2a"),
    _model("part of the channels turn", rotary_percent=0.5, kv_channels=8),
    _model("ungated MLP", gated_linear_unit=False, activation_func=F.gelu),
    _model("deterministic mode", deterministic_mode=True),
    Varied(
        "biases",
        model={"add_bias_linear": True},
        pattern="AFAF",
        axes=("TP", _WITHOUT_SP, "CP", "DP", "PP", "VPP"),
    ),
    Varied("hidden dropout", model={"hidden_dropout": 0.2}, pattern="AMRF", axes=(_WITHOUT_SP,)),
    # Recomputation.
    Varied(
        "recompute with dropout",
        model={"recompute_modules": ["core_attn", "mamba", "m2rnn", "mlp"], **_SELECTIVE},
        pattern="AMRF",
        axes=(_WITHOUT_SP,),
    ),
    _model(
        "recompute modules",
        "shared expert overlap",
        recompute_modules=["core_attn", "shared_experts", "mamba", "m2rnn", "mlp"],
        **_SELECTIVE,
    ),
    _model(
        "recompute modules of packs",
        recompute_modules=["moe", "mamba", "m2rnn", "mlp"],
        **_SELECTIVE,
    ),
    _model("recompute all layers", recompute_method="uniform", recompute_num_layers=3, **_FULL),
    Varied(
        "recompute first layers",
        model={"recompute_method": "block", "recompute_num_layers": 2, **_FULL},
        dtype="float32",
    ),
    # The optimizer; with the expert bias, which moves after every step.
    Varied("three steps", spec={"steps": 3, "learning_rate": 1e-3}, dtype="float32"),
    Varied("weight decay", optimizer={"weight_decay": 0.3}, dtype="float32"),
    Varied("tight clipping", optimizer={"clip_grad": 0.1}, dtype="float32"),
    Varied("bias update rate", model={"moe_router_bias_update_rate": 0.1}, dtype="float32"),
    Varied(  # float64 cases without it have the other value
        "gradients after the backward pass",
        ddp={"overlap_grad_reduce": False},
        apart=("starved experts",),
    ),
    Varied("gradient overlap", ddp={"overlap_grad_reduce": True}, dtype="float32"),
    Varied("small buckets", ddp={"bucket_size": 2000}, dtype="float32"),
    Varied("distributed optimizer", spec=_SHARDED, dtype="float32"),
    Varied(
        "parameter overlap",
        ddp={"overlap_param_gather": True, "overlap_grad_reduce": True, "bucket_size": 2000},
        optimizer={"overlap_param_gather": True},
        spec=_SHARDED,
        dtype="float32",
    ),
    # Mixed precision, with the router's own choice of experts.
    Varied("bfloat16 with top-k", dtype="bfloat16"),
    Varied(
        "bfloat16 in shards",
        ddp={"overlap_param_gather": True, "overlap_grad_reduce": True},
        spec=_SHARDED,
        dtype="bfloat16",
    ),
)
"""What the covering list varies."""


@dataclass(frozen=True)
class CoveringCase:
    """Settings that are on together, in one layout.

    Attributes:
        settings: what is varied.
        axis: key of :data:`LAYOUTS`.
        layout: the layout.
        spec: what is computed, there and on one rank.
    """

    settings: tuple[Varied, ...]
    axis: str
    layout: ParallelLayout
    spec: StepSpec

    @property
    def name(self) -> str:
        """A short name: the bundle's first setting and how many more, and the axis."""
        first, *more = self.settings
        return f"{first.name}+{len(more)}-{self.axis}"


@cache
def bundles() -> tuple[tuple[Varied, ...], ...]:
    """Return the settings in groups that can be on together, each in the first that fits."""
    found: list[list[Varied]] = []
    for setting in SETTINGS:
        for bundle in found:
            if all(setting.goes_with(other) for other in bundle):
                bundle.append(setting)
                break
        else:
            found.append([setting])
    return tuple(tuple(bundle) for bundle in found)


@cache
def cases() -> tuple[CoveringCase, ...]:
    """Return the covering list: every bundle in every layout that it is legal in."""
    found = []
    for bundle in bundles():
        for axis, text in LAYOUTS.items():
            if legal := tuple(setting for setting in bundle if setting.is_legal_on(axis)):
                spec = spec_of(legal, axis)
                found.append(CoveringCase(legal, axis, ParallelLayout.parse(text), spec))
    return tuple(found)


def spec_of(bundle: tuple[Varied, ...], axis: str) -> StepSpec:
    """Return what a case of ``bundle`` computes."""
    dtype = bundle[0].dtype
    fields: dict[str, Any] = {
        "model": tiny_model(bundle[0].pattern or _PATTERNS.get(axis, _PATTERN)),
        "ddp": {},
        "optimizer": {},
    }
    for setting in bundle:
        for name in ("model", "ddp", "optimizer"):
            fields[name] |= getattr(setting, name)
        fields |= setting.spec
    return StepSpec(dtype=dtype, objective="logits" if dtype == "float64" else "loss", **fields)
