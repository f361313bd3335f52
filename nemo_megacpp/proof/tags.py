"""What each rank holds of every parameter, against the tags that Megatron reads.

A missing or a wrong tag changes a sum of gradients or the gradient norm, and through it the clipped
step. For a small parameter that is less than any tolerance of the norm, so it is not measured here
but counted: see :mod:`nemo_megacpp.proof.tag_rules`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from nemo_megacpp.checkpoint.dcp import model_sharded_state_dict
from nemo_megacpp.proof.tag_rules import Held, Part, Ranks, RankTags, Violation, violations


def tag_violations(chunks: Sequence[torch.nn.Module]) -> list[Violation]:
    """Return the parameters whose tags do not agree with what ranks hold of them.

    A collective over all ranks; every rank gets the same list. To see parameters that are declared
    replicated and initialised differently, call it before weights are loaded.

    Args:
        chunks: this rank's model chunks, unwrapped.
    """
    mine = _report(chunks)
    first = torch.distributed.get_rank() == 0
    reports: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
    torch.distributed.gather_object(mine, reports)
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
    saved = [item] if isinstance(item, ShardedTensor) else nested_values(item.build())
    return tuple(_part(tensor) for tensor in saved)


def _part(tensor: ShardedTensor) -> Part:
    sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    place = tuple(
        (first, first + size) for first, size in zip(tensor.global_offset, sizes, strict=True)
    )
    return Part(tensor.key, tuple(tensor.global_shape), place, tensor.prepend_axis_num)


def _digest(tensor: torch.Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).digest()
