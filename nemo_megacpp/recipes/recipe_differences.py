"""The differences between two recipes, by axis.

A comparison is meaningful if one axis differs. SP is TP's activation layout: it counts only where
both sides have TP > 1. What follows from another degree is not an axis of its own: the cuts where
the number of pipeline chunks differs, DP in a world of a given size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.pattern import Family
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.training import groups

AXES = (
    *("TP", "SP", "CP", "EP", "ETP", "PP", "VPP", "DP"),
    *("batch", "sequence", "precision", "kernels", "recompute", "optimizer", "data", "start"),
    "model",
)
"""``start`` is the checkpoint that a run resumes; ``DP`` the number of replicas, where a number of
ranks is given."""

_MODEL_AXES = {
    "sequence": r"seq_length",
    "recompute": r"recompute_.*|distribute_saved_activations|cpu_offloading.*",
    "CP": r"m2rnn_context_parallel|cp_comm_type|hierarchical_context_parallel_sizes",
    "precision": r"fp8.*|fp4.*|fp16_.*|fp32_.*|attention_softmax_in_fp32|moe_router_dtype",
    "kernels": r".*_(fusion|kernel|fused|overlap)|.*overlap.*|attention_backend|transformer_impl|"
    r"moe_(grouped_gemm|token_dispatcher_type)|persist_layer_norm|batch_p2p_.*|tp_comm_.*|"
    r".*cuda_graph.*|deterministic_mode|cross_entropy_fusion_impl|deallocate_pipeline_outputs",
}
_GROUP_AXES = {"batch": "batch", "optimizer": "optimizer"}
"""Other groups of settings decide how long a run is and what is logged and saved: no axis."""
_TRAINING_AXES = {
    **{name: _GROUP_AXES.get(group) for group, names in groups().items() for name in names},
    "max_steps": "optimizer",
    "precision": "precision",
    **dict.fromkeys(("seed", "packed_documents"), "data"),
}


@dataclass(frozen=True)
class SettingDifference:
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


def differences(a: Recipe, b: Recipe) -> list[SettingDifference]:
    """Return the differences between two recipes with legal layouts, by axis."""
    found = [*_degrees(a, b), *_depth(a, b), *_fields(a, b)]
    return sorted(found, key=lambda item: (AXES.index(item.axis), item.setting))


def moved_axes(found: list[SettingDifference]) -> list[str]:
    """Return the axes that differ, in the order of `AXES`."""
    return [axis for axis in AXES if any(item.axis == axis for item in found)]


def _degrees(a: Recipe, b: Recipe) -> Iterator[SettingDifference]:
    one, two = a.layout, b.layout
    names = ["tp", "cp", "pp"]
    names += ["sp"] if one.tp > 1 and two.tp > 1 else []
    names += ["vpp"] if one.pp > 1 and two.pp > 1 else []
    experts = [Family.EXPERT in recipe.pattern.all_families for recipe in (a, b)]
    names += ["ep", "etp"] if any(experts) else []
    for name in names:
        before, after = getattr(one, name), getattr(two, name)
        if before != after:
            texts = [
                _text(value) + (" (follows TP)" if name == "etp" and given is None else "")
                for value, given in (
                    (before, one.expert_tensor_parallel_size),
                    (after, two.expert_tensor_parallel_size),
                )
            ]
            yield SettingDifference(name.upper(), name, *texts)
    said = one.world_size is not None or two.world_size is not None
    if said and one.world != two.world and one.data_parallel_size != two.data_parallel_size:
        yield SettingDifference("DP", "world_size", str(one.world), str(two.world))


def _depth(a: Recipe, b: Recipe) -> Iterator[SettingDifference]:
    one, two = a.pattern, b.pattern
    if one.uncut != two.uncut:
        yield SettingDifference("model", "hybrid_pattern", one.uncut, two.uncut)
        return
    chunks = a.layout.chunks_count
    if chunks == b.layout.chunks_count:
        before, after = one.chunks(chunks), two.chunks(chunks)
        if before != after:
            yield SettingDifference("PP", "cuts", _layers(before), _layers(after))


def _fields(a: Recipe, b: Recipe) -> Iterator[SettingDifference]:
    defaults = {f.name: f.default for f in dataclasses.fields(HybridConfig)}
    for name in sorted({*a.model, *b.model} - {"hybrid_pattern", "num_layers"}):
        before, after = (side.model.get(name, defaults.get(name)) for side in (a, b))
        if before != after:
            yield SettingDifference(_model_axis(name), name, _text(before), _text(after))
    for name, axis in _TRAINING_AXES.items():
        before, after = getattr(a.training, name), getattr(b.training, name)
        if axis and before != after:
            yield SettingDifference(axis, name, _text(before), _text(after))
    for axis, name in (("data", "data"), ("start", "resume"), ("start", "init_from")):
        before, after = getattr(a, name), getattr(b, name)
        if before != after:
            yield SettingDifference(axis, name, _text(before), _text(after))


def _model_axis(name: str) -> str:
    for axis, names in _MODEL_AXES.items():
        if re.fullmatch(names, name):
            return axis
    return "model"


def _layers(chunks: tuple[range, ...]) -> str:
    return "+".join(str(len(chunk)) for chunk in chunks)


def _text(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
