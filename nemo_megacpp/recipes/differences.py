"""What differs between two recipes, sorted into axes.

A comparison means something when one axis moved. SP is TP's activation layout: it counts only
where both sides have TP > 1. What follows from a degree does not count on its own: cuts where the
number of pipeline chunks moved, DP in one world, or in the worlds that the degrees need.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.pattern import Family
from nemo_megacpp.recipes.catalog import Training
from nemo_megacpp.recipes.recipe import Recipe

AXES = (
    *("TP", "SP", "CP", "EP", "ETP", "PP", "VPP", "DP"),
    *("batch", "sequence", "precision", "kernels", "recompute", "optimizer", "data", "start"),
    "model",
)
"""``start`` is the checkpoint that a run begins from; ``DP`` the number of replicas, where a number
of ranks was given."""

_MODEL_AXES = {
    "sequence": r"seq_length",
    "recompute": r"recompute_.*|distribute_saved_activations|cpu_offloading.*",
    "CP": r"m2rnn_context_parallel|cp_comm_type|hierarchical_context_parallel_sizes",
    "precision": r"fp8.*|fp4.*|fp16_.*|fp32_.*|attention_softmax_in_fp32|moe_router_dtype",
    "kernels": r".*_(fusion|kernel|fused|overlap)|.*overlap.*|attention_backend|transformer_impl|"
    r"moe_(grouped_gemm|token_dispatcher_type)|persist_layer_norm|batch_p2p_.*|tp_comm_.*|"
    r".*cuda_graph.*|deterministic_mode|cross_entropy_fusion_impl|deallocate_pipeline_outputs",
}
TRAINING_AXES = {
    **dict.fromkeys(("micro_batch_size", "global_batch_size"), "batch"),
    **dict.fromkeys(("lr", "min_lr", "warmup_steps", "max_steps"), "optimizer"),
    **dict.fromkeys(("weight_decay", "clip_grad", "adam_beta2"), "optimizer"),
    "use_distributed_optimizer": "optimizer",
    "precision": "precision",
    **dict.fromkeys(("seed", "packed_documents"), "data"),
}
NO_AXIS = frozenset(
    (
        *("stop_after", "val_check_interval", "limit_val_batches", "log_interval"),
        *("save_interval", "async_save", "keep_last", "keep_every", "verify_checkpoint"),
        *("tensorboard", "wandb_project", "wandb_name", "use_pytorch_profiler"),
        *("profile_step_start", "profile_step_end", "profile_ranks"),
    )
)
"""They decide how long and how often a run is looked at, not what a step computes."""


@dataclass(frozen=True)
class Difference:
    """One setting that differs.

    Attributes:
        axis: one of `AXES`.
        setting: its name in a recipe.
        a, b: its value on either side, as text.
    """

    axis: str
    setting: str
    a: str
    b: str


def differences(a: Recipe, b: Recipe) -> list[Difference]:
    """Return what differs between two recipes whose layouts are legal, by axis."""
    found = [*_degrees(a, b), *_depth(a, b), *_fields(a, b)]
    return sorted(found, key=lambda item: (AXES.index(item.axis), item.setting))


def moved_axes(found: list[Difference]) -> list[str]:
    """Return the axes that moved, in the order of `AXES`."""
    return [axis for axis in AXES if any(item.axis == axis for item in found)]


def _degrees(a: Recipe, b: Recipe) -> Iterator[Difference]:
    one, two = a.layout, b.layout
    names = ["tp", "cp", "pp"]
    names += ["sp"] if one.tp > 1 and two.tp > 1 else []
    names += ["vpp"] if one.pp > 1 and two.pp > 1 else []
    experts = [Family.EXPERT in recipe.pattern.families for recipe in (a, b)]
    names += ["ep", "etp"] if any(experts) else []
    for name in names:
        before, after = getattr(one, name), getattr(two, name)
        if before != after:
            follows = [
                " (follows TP)"
                if name == "etp" and layout.expert_tensor_parallel_size is None
                else ""
                for layout in (one, two)
            ]
            yield Difference(
                name.upper(), name, _text(before) + follows[0], _text(after) + follows[1]
            )
    said = one.world_size is not None or two.world_size is not None
    if said and one.world != two.world and one.data_parallel_size != two.data_parallel_size:
        yield Difference("DP", "world_size", str(one.world), str(two.world))


def _depth(a: Recipe, b: Recipe) -> Iterator[Difference]:
    one, two = a.pattern, b.pattern
    if one.letters != two.letters:
        yield Difference("model", "hybrid_pattern", one.letters, two.letters)
        return
    chunks = a.layout.chunks_count
    if chunks == b.layout.chunks_count:
        before, after = one.chunks(chunks), two.chunks(chunks)
        if before != after:
            yield Difference("PP", "cuts", _layers(before), _layers(after))


def _fields(a: Recipe, b: Recipe) -> Iterator[Difference]:
    defaults = {f.name: f.default for f in dataclasses.fields(HybridConfig)}
    for name in sorted({*a.model, *b.model} - {"hybrid_pattern", "num_layers"}):
        before, after = (side.model.get(name, defaults.get(name)) for side in (a, b))
        if before != after:
            yield Difference(_model_axis(name), name, _text(before), _text(after))
    for name in (f.name for f in dataclasses.fields(Training)):
        before, after = getattr(a.training, name), getattr(b.training, name)
        if before != after and name not in NO_AXIS:
            yield Difference(TRAINING_AXES[name], name, _text(before), _text(after))
    for axis, name in (("data", "data"), ("start", "resume")):
        before, after = getattr(a, name), getattr(b, name)
        if before != after:
            yield Difference(axis, name, _text(before), _text(after))


def _model_axis(name: str) -> str:
    for axis, names in _MODEL_AXES.items():
        if re.fullmatch(names, name):
            return axis
    return "model"


def _layers(chunks: tuple[range, ...]) -> str:
    return "+".join(str(len(chunk)) for chunk in chunks)


def _text(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
