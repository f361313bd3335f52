"""Who owns what: each parameter's shapes, what splits it, and how its gradient is completed.

The words, per mesh axis: *varying*: each rank has its own part; *replicated*: every rank has the
whole and a partial gradient, which must be summed; *invariant*: every rank has the whole and the
same gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nemo_megacpp.contract.stages import BuiltChunk, BuiltParameter, BuiltStage
from nemo_megacpp.formulas.sizes import PREDICTION, Job
from nemo_megacpp.layout.placement import group_size
from nemo_megacpp.side_channels import channel_place, channels_at, read_side_channels


@dataclass(frozen=True)
class OwnedParameter:
    """One parameter of a family, the same in all layers of the family.

    Attributes:
        family: a letter, ``embedding``, ``head``, ``prediction``, or a place of side channels.
        name: within the layer; all experts of a rank under one name, stacked on a leading axis.
        layers: how many layers of the whole model have it.
        global_shape, local_shape: of the whole, and of one rank's part.
        on: for each axis of the mesh with more than one rank, ``varying``, ``replicated`` or
            ``invariant``.
        split: ``axis 0 by tp``, …; empty if nothing splits it.
        why: why it is whole on an axis that splits its neighbours.
        gradient: how the gradient is completed.
    """

    family: str
    name: str
    layers: int
    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    on: dict[str, str]
    split: tuple[str, ...]
    why: str
    gradient: tuple[str, ...]

    @property
    def local_numel(self) -> int:
        return math.prod(self.local_shape)


def ownership(job: Job, stages: Sequence[BuiltStage]) -> list[OwnedParameter]:
    """Return the parameters of the whole model, family by family, in the order of depth."""
    found: dict[tuple[str, str], OwnedParameter] = {}
    layers: dict[tuple[str, str], set[int | str | None]] = {}
    for chunk in sorted((c for stage in stages for c in stage.chunks), key=lambda c: c.index):
        # Experts of one layer on this rank.
        experts = len({p.name.split("local_experts.")[1].split(".")[0]
                       for p in chunk.parameters if p.is_expert})  # fmt: skip
        for parameter in chunk.parameters:
            family, name = place = _place(job, parameter, chunk)
            which = parameter.name if family == PREDICTION else parameter.layer
            layers.setdefault(place, set()).add(which)
            if place not in found:
                local = parameter.local_shape
                if parameter.is_expert and len(local) == 3:
                    local = (experts, *local[1:])
                found[place] = _owned(job, family, name, parameter, local)
    return [replace(owned, layers=len(layers[place])) for place, owned in found.items()]


def parameter_count(owned: Iterable[OwnedParameter]) -> int:
    """Return the parameters of the whole model, each once."""
    return sum(item.layers * math.prod(item.global_shape) for item in owned)


def _place(job: Job, parameter: BuiltParameter, chunk: BuiltChunk) -> tuple[str, str]:
    """Return the family and the name within the layer, which all experts of a layer share."""
    parts = parameter.name.split(".")
    if parameter.is_side_channel:
        channels = read_side_channels(job.model.get("side_channels"))
        place = channel_place(channels_at(channels, parameter.layer))
        return place, ".".join(parts[2 if parameter.layer is None else 3 :])
    if parameter.layer is None:
        inside = parts[3:] if parameter.end == PREDICTION else parts
        return parameter.end, ".".join(inside)
    first = 6 if parts[0] == "mtp" else 3
    name = ".".join(part for part in parts[first:] if not (parameter.is_expert and part.isdigit()))
    return dict(chunk.numbered)[parameter.layer], name


def _owned(
    job: Job, family: str, name: str, parameter: BuiltParameter, local: tuple[int, ...]
) -> OwnedParameter:
    expert = parameter.is_expert
    split = {}
    for axis, (whole, part) in enumerate(zip(parameter.global_shape, local, strict=True)):
        if whole != part:
            split[axis] = "tp" if not expert else ("ep" if len(local) == 3 and axis == 0 else "etp")
    on: dict[str, str] = {}
    for mesh in ("etp", "ep", "edp") if expert else ("tp", "cp", "dp"):
        if group_size(job.layout, mesh) > 1:
            on[mesh] = "varying" if mesh in split.values() else "replicated"
    if on.get("tp") == "replicated" and not (parameter.sequence_parallel or parameter.sums_over_tp):
        on["tp"] = "invariant"
    return OwnedParameter(
        family,
        name,
        0,
        parameter.global_shape,
        local,
        on,
        tuple(f"axis {axis} by {by}" for axis, by in split.items()),
        _why(parameter, on),
        tuple(_gradient(job, parameter, on)),
    )


def _why(parameter: BuiltParameter, on: dict[str, str]) -> str:
    if on.get("tp") == "invariant":
        return "acts on the hidden width, which without SP every tp rank has whole"
    if on.get("tp") != "replicated":
        return ""
    if parameter.sums_over_tp:
        return "shared by all heads: each tp rank uses the whole for its own"
    return "acts on the hidden width; under SP each tp rank has other tokens"


def _gradient(job: Job, parameter: BuiltParameter, on: dict[str, str]) -> list[str]:
    """Return the sums in Megatron's order: in the backward pass, over replicas, at the end."""
    steps = []
    partial_on_tp = on.get("tp") == "replicated"
    if partial_on_tp and not job.layout.sp:
        steps.append("all-reduced over tp, in every backward pass")
    group = "edp" if parameter.is_expert else "dp-cp"
    if group_size(job.layout, group) > 1:
        if job.use_distributed_optimizer:
            steps.append(f"reduce-scattered over {group} (the parameter is gathered back)")
        else:
            steps.append(f"all-reduced over {group}")
    if partial_on_tp and job.layout.sp:
        steps.append("all-reduced over tp, once per step (sequence_parallel tag)")
    if parameter.shared_embedding and job.layout.pp > 1:
        tied = job.model.get("share_embeddings_and_output_weights")
        why = "tied to the head" if tied else "prediction depths have a copy"
        steps.append(f"all-reduced between first and last stage ({why})")
    return steps or ["complete on the rank"]
