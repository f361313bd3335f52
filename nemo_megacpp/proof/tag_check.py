"""The check of tags: what each rank holds of every parameter, against the tags that Megatron reads.

Megatron reads tags of a parameter (``tensor_model_parallel``, ``shared``, ``allreduce``,
``sequence_parallel``) to decide over which ranks its gradient is summed and which ranks count it in
the gradient norm. A missing or a wrong tag changes that sum or the norm, and through it the clipped
step. For a small parameter that is less than any tolerance of the norm, so it is not measured but
counted: the rules compare the tags with the part of the parameter that each rank saves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from nemo_megacpp.checkpoint.dcp import model_sharded_state_dict
from nemo_megacpp.proof.gather import gather_objects


class Part(NamedTuple):
    """A part of a saved tensor.

    Attributes:
        key: of the tensor in a checkpoint.
        shape: of the whole tensor.
        place: first index and end on each axis of the whole.
        stacked: leading axes that only the saved tensor has (experts of a layer).
    """

    key: str
    shape: tuple[int, ...]
    place: tuple[tuple[int, int], ...]
    stacked: int


class Held(NamedTuple):
    """A parameter as one rank holds it.

    Attributes:
        parts: the parts that it is saved as; empty if it is not saved.
        expert: whether DDP reduces it over the expert groups (``allreduce=False``).
        counted: whether this rank counts it in the gradient norm.
        summed_over_tp: whether Megatron sums its gradient over tp at the end of a step.
        tagged: ``tensor_model_parallel``.
        partition_dim: the tag; -1 where there is none.
        shared: the tag.
        digest: of its values.
    """

    parts: tuple[Part, ...]
    expert: bool
    counted: bool
    summed_over_tp: bool
    tagged: bool
    partition_dim: int
    shared: bool
    digest: bytes


Ranks = tuple[int, ...]


class RankTags(NamedTuple):
    """What one rank reports.

    Attributes:
        held: its trainable parameters, by their names in the rank's chunks.
        split: the tensor-parallel group of dense and of expert parameters.
        reduced: the group over which DDP reduces dense and expert gradients.
        normed: the group over which their squares are summed for the gradient norm.
    """

    held: Mapping[str, Held]
    split: tuple[Ranks, Ranks]
    reduced: tuple[Ranks, Ranks]
    normed: tuple[Ranks, Ranks]


@dataclass(frozen=True)
class TagViolation:
    """A parameter whose tags do not agree with what ranks hold of it.

    Attributes:
        parameter: its key in a checkpoint, or its name in the model where it has none.
        problem: what is wrong, and what it does.
        remedy: what to change.
    """

    parameter: str
    problem: str
    remedy: str


def tag_violations(chunks: Sequence[torch.nn.Module]) -> list[TagViolation]:
    """Return the parameters whose tags do not agree with what ranks hold of them.

    A collective over all ranks; every rank gets the same list. Only before weights are loaded does
    it see parameters that are declared replicated and initialised differently.

    Args:
        chunks: this rank's model chunks, unwrapped.
    """
    reports = gather_objects(_report(chunks))
    found = [None if reports is None else violations(reports)]
    torch.distributed.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def _report(chunks: Sequence[torch.nn.Module]) -> RankTags:
    parts = {
        id(item.data): _parts(item)
        for item in nested_values(model_sharded_state_dict(chunks))
        if isinstance(item, ShardedTensor | ShardedTensorFactory) and item.data is not None
    }
    return RankTags(
        held={
            f"chunk{index}.{name}": _held(chunk.config, name, parameter, parts)
            for index, chunk in enumerate(chunks)
            for name, parameter in chunk.named_parameters()
            if parameter.requires_grad
        },
        split=(
            _ranks(parallel_state.get_tensor_model_parallel_group()),
            _ranks(parallel_state.get_expert_tensor_parallel_group()),
        ),
        reduced=(
            _ranks(parallel_state.get_data_parallel_group(with_context_parallel=True)),
            _ranks(parallel_state.get_expert_data_parallel_group()),
        ),
        # With the distributed optimizer the sum goes over the whole world, but each rank of a
        # reduction group then has its own share of what the group holds: the count is the same.
        normed=(
            _ranks(parallel_state.get_model_parallel_group()),
            _ranks(parallel_state.get_expert_tensor_model_pipeline_parallel_group()),
        ),
    )


def _ranks(group: torch.distributed.ProcessGroup) -> Ranks:
    return tuple(torch.distributed.get_process_group_ranks(group))


def _held(
    config: Any, name: str, parameter: torch.nn.Parameter, parts: dict[int, tuple[Part, ...]]
) -> Held:
    # As finalize_model_grads of Megatron-Core 0.16.1 chooses what it sums over tp.
    by_name = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
    by_tag = config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
    return Held(
        parts=parts.get(id(parameter), ()),
        expert=not getattr(parameter, "allreduce", True),
        counted=param_is_not_shared(parameter)
        and param_is_not_tensor_parallel_duplicate(parameter),
        summed_over_tp=bool(by_tag or by_name),
        tagged=bool(getattr(parameter, "tensor_model_parallel", False)),
        partition_dim=getattr(parameter, "partition_dim", -1),
        shared=bool(getattr(parameter, "shared", False)),
        digest=_digest(parameter),
    )


def _parts(item: ShardedTensor | ShardedTensorFactory) -> tuple[Part, ...]:
    parts = []
    for tensor in [item] if isinstance(item, ShardedTensor) else nested_values(item.build()):
        sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
        bounds = zip(tensor.global_offset, sizes, strict=True)
        place = tuple((first, first + size) for first, size in bounds)
        parts.append(Part(tensor.key, tuple(tensor.global_shape), place, tensor.prepend_axis_num))
    return tuple(parts)


def _digest(tensor: torch.Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).digest()


def violations(ranks: Sequence[RankTags]) -> list[TagViolation]:
    """Return every violation once, by parameter.

    Args:
        ranks: what each rank reported, by rank.
    """
    found = [
        *_not_saved(ranks),
        *_summed_with_another_part(ranks),
        *_wrong_partition_dim(ranks),
        *_counted_not_once(ranks),
        *_initialised_differently(ranks),
    ]
    return sorted(dict.fromkeys(found), key=lambda violation: violation.parameter)


def _not_saved(ranks: Sequence[RankTags]) -> Iterator[TagViolation]:
    for rank in ranks:
        for name, held in rank.held.items():
            if not held.parts:
                yield TagViolation(
                    name,
                    "it is not in the model's sharded_state_dict: it is neither saved nor compared",
                    "return the parameter itself from sharded_state_dict of its module (from "
                    "state_dict(keep_vars=True), not a copy)",
                )


def _summed_with_another_part(ranks: Sequence[RankTags]) -> Iterator[TagViolation]:
    """Gradients are summed over ranks that hold the same part: by DDP, and over tp by the tag."""
    for rank in ranks:
        for name, held in rank.held.items():
            if not held.parts:
                continue
            if _differs(ranks, rank.reduced[held.expert], name, held):
                kind = "an expert" if held.expert else "a dense"
                yield TagViolation(
                    held.parts[0].key,
                    f"DDP sums its gradient as that of {kind} parameter, over ranks that hold "
                    f"different parts of it",
                    "set parameter.allreduce = False on weights of experts, and only there",
                )
            if held.summed_over_tp and _differs(ranks, rank.split[0], name, held):
                yield TagViolation(
                    held.parts[0].key,
                    "it carries sequence_parallel, so that its gradient is summed over "
                    "tensor-parallel ranks, which hold different parts of it",
                    "set parameter.sequence_parallel = False",
                )


def _differs(ranks: Sequence[RankTags], group: Ranks, name: str, held: Held) -> bool:
    """Whether a rank of ``group`` holds another part under this name, or no part."""
    others = (ranks[member].held.get(name) for member in group)
    return any(other is None or other.parts != held.parts for other in others)


def _wrong_partition_dim(ranks: Sequence[RankTags]) -> Iterator[TagViolation]:
    for rank in ranks:
        for name, held in rank.held.items():
            axes = _split_axes(ranks, rank, name, held)
            if axes and held.tagged and held.partition_dim not in (-1, *axes):
                yield TagViolation(
                    held.parts[0].key,
                    f"tensor-parallel ranks split its axis {axes[0]}, and its partition_dim is "
                    f"{held.partition_dim}",
                    _tag(axes[0]),
                )


def _split_axes(
    ranks: Sequence[RankTags], rank: RankTags, name: str, held: Held
) -> tuple[int, ...]:
    """Return the parameter's axes on which ranks of its tensor-parallel group hold other parts."""
    axes = set()
    for member in rank.split[held.expert]:
        other = ranks[member].held.get(name)
        for mine, theirs in zip(held.parts, other.parts if other else (), strict=False):
            for axis, (a, b) in enumerate(zip(mine.place, theirs.place, strict=True)):
                if a != b and axis >= mine.stacked:
                    axes.add(axis - mine.stacked)
    return tuple(sorted(axes))


def _tag(axis: int) -> str:
    return (
        f"set_tensor_model_parallel_attributes(parameter, True, {axis}, 1) of "
        f"megatron.core.tensor_parallel.layers"
    )


_Holder = tuple[RankTags, str, Held]


def _counted_not_once(ranks: Sequence[RankTags]) -> Iterator[TagViolation]:
    """Each group that sums squares for the gradient norm counts every part exactly once.

    A part that no rank of the group holds is found by :func:`_summed_with_another_part`.
    """
    for expert in (False, True):
        for group in dict.fromkeys(rank.normed[expert] for rank in ranks):
            holders: dict[Part, list[_Holder]] = {}
            for rank in (ranks[member] for member in group):
                for name, held in rank.held.items():
                    for part in held.parts if held.expert == expert else ():
                        holders.setdefault(part, []).append((rank, name, held))
            for part, here in holders.items():
                times = sum(held.counted for _, _, held in here)
                if times != 1:
                    yield _miscounted(ranks, part.key, here, times)


def _miscounted(
    ranks: Sequence[RankTags], key: str, holders: Sequence[_Holder], times: int
) -> TagViolation:
    if times and any(held.tagged for _, _, held in holders):
        return TagViolation(
            key,
            f"it is tagged tensor_model_parallel, and several ranks hold the same part of it: the "
            f"gradient norm counts it {times} times",
            "leave the tag off what every tensor-parallel rank holds whole; on weights of experts "
            "set parameter.allreduce = False",
        )
    if times:
        return TagViolation(
            key,
            f"several pipeline stages hold it: the gradient norm counts it {times} times",
            "set parameter.shared = True on all stages but one",
        )
    if all(held.shared for _, _, held in holders):
        return TagViolation(
            key,
            "it is tagged shared wherever it is held: the gradient norm leaves it out",
            "set parameter.shared = True on copies only",
        )
    axes = next((a for r, n, h in holders if (a := _split_axes(ranks, r, n, h))), (0,))
    return TagViolation(
        key,
        "ranks hold different parts of it, and it is not tagged tensor_model_parallel: the "
        "gradient norm counts one of the parts only",
        _tag(axes[0]),
    )


def _initialised_differently(ranks: Sequence[RankTags]) -> Iterator[TagViolation]:
    digests: dict[tuple[Part, ...], bytes] = {}
    for rank in ranks:
        for held in rank.held.values():
            if held.parts and digests.setdefault(held.parts, held.digest) != held.digest:
                yield TagViolation(
                    held.parts[0].key,
                    "ranks that hold the same part of it have different values",
                    "initialise what every tensor-parallel rank holds whole outside "
                    "get_cuda_rng_tracker().fork(); if ranks are to hold different parts, say so "
                    "in sharded_state_dict and tag it",
                )
