"""What a proof reads under Megatron's FSDP, which leaves each data-parallel rank a part of every
parameter and gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

from nemo_megacpp.proof.gather import GlobalValues, gather_values


def unwrapped(chunk: torch.nn.Module) -> torch.nn.Module:
    """Return a model without FSDP around it."""
    while hasattr(chunk, "module"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def gather_gradients(wrapped: Sequence[FullyShardedDataParallel]) -> GlobalValues | None:
    """Gather the reduced gradient of every parameter to rank 0, before the optimizer steps."""
    return _gather(wrapped, lambda part: part.grad)


def gather_parameters(wrapped: Sequence[FullyShardedDataParallel]) -> GlobalValues | None:
    """Gather every saved tensor to rank 0: of a parameter what the optimizer steps."""
    return _gather(wrapped, lambda part: part, others=True)


def _gather(
    wrapped: Sequence[FullyShardedDataParallel],
    value_of: Callable[[Any], torch.Tensor | None],
    others: bool = False,
) -> GlobalValues | None:
    whole = {
        id(parameter): value
        for chunk in wrapped
        for parameter, value in _whole_values(chunk, value_of)
    }
    with contextlib.ExitStack() as stack:
        for chunk in wrapped:
            stack.enter_context(_own_parameters(chunk))
        return gather_values(
            [unwrapped(chunk) for chunk in wrapped],
            lambda tensor: whole.get(id(tensor), tensor if others else None),
        )


def _whole_values(
    chunk: FullyShardedDataParallel, value_of: Callable[[Any], torch.Tensor | None]
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Yield every parameter of the model and its value, whose parts lie on the ranks of the
    parameter's FSDP group in order."""
    buffer = chunk.param_and_grad_buffer
    by_group: dict[bool, list[Any]] = {False: [], True: []}
    for _, part in buffer.optimizer_named_parameters:
        place = buffer.param_to_param_group[part.orig_param]
        by_group[buffer.parameter_groups[place].is_expert_param].append(part)
    for is_expert, parts in by_group.items():
        if not parts:
            continue
        group = buffer.dist_index.get_fsdp_group(is_expert_parallel=is_expert)
        values = [value_of(part) for part in parts]
        mine = [None if v is None else v.to_local().detach().flatten().clone() for v in values]
        everyone: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(everyone, mine, group=group)
        for part, pieces in zip(parts, zip(*everyone, strict=True), strict=True):
            known = [piece for piece in pieces if piece is not None]
            if known:
                yield part.orig_param, torch.cat(known).view(part.orig_param.shape)


@contextlib.contextmanager
def _own_parameters(chunk: FullyShardedDataParallel) -> Iterator[None]:
    """Give the model its own parameters, whose shapes say what a checkpoint holds of them; between
    steps it has FSDP's, and a hook of ``state_dict`` would bring those back."""
    fsdp = chunk.module
    fsdp._replace_param_with_raw_if_needed()
    fsdp.is_param_fsdp_distributed = True
    yield
    fsdp.is_param_fsdp_distributed = False
    fsdp._replace_param_with_distributed_if_needed()
