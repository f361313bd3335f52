"""Megatron's optimizer state in a checkpoint: one form for every layout and optimizer.

Every moment and every float32 master weight is saved in the global shape of its parameter, sharded
as the parameter is (packed projections component by component). The step and the settings of the
parameter groups, which all parameters share, are saved once. So the state loads into any legal
layout, with or without the distributed optimizer.

Megatron-Core 0.16.1's own form does less, and without Transformer Engine or Apex it fails:

- only global rank 0 saves the step. Where its stage has no E block, the expert optimizers of the
  other stages lose theirs;
- with torch's Adam no sharding type of the distributed optimizer loads (it asserts one step before
  there is a state, and copies a tensor ``step`` that it did not save), and a stage without experts
  cannot save;
- its ``dp_reshardable`` type, NeMo's default, saves flat buffers that only the same tensor-,
  pipeline- and expert-parallel degrees can read;
- where a bfloat16 model also has float32 parameters, both optimizers confuse the states of two
  parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from nemo_megacpp.checkpoint.dcp import model_sharded_state_dict
from nemo_megacpp.checkpoint.script_state import is_script_form
from nemo_megacpp.errors import UserError

FORM = "optimizer_state"
"""Key of the content metadata of a checkpoint whose optimizer state has this form."""

_SHARDING_TYPE = "fully_reshardable"
_GROUP_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
_OF_SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd")
"""Settings of a group that Megatron's scheduler reads: a run resumes on its own schedule."""
_MASTER_WEIGHT = "fp32_param"  # as Megatron's plain bf16 optimizer names it


def content_metadata(use_distributed_optimizer: bool) -> dict[str, Any]:
    """Return the content metadata of a checkpoint, which Megatron reads as well."""
    metadata: dict[str, Any] = {FORM: 1, "chained_optim_avoid_prefix": True}
    if use_distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = _SHARDING_TYPE
    return metadata


def validate_optimizer_form(metadata: Mapping[str, Any] | None) -> None:
    """Refuse optimizer state that was neither written by this module nor by Megatron's script in a
    form that every layout loads.

    Args:
        metadata: the checkpoint's content metadata.

    Raises:
        UserError: naming its form.
    """
    found = metadata or {}
    if FORM in found or is_script_form(found):
        return
    kind = found.get("distrib_optim_sharding_type", "without the distributed optimizer")
    if kind in ("dp_reshardable", "dp_zero_gather_scatter"):
        kind += ": only the degrees it was saved with can load it, data parallelism apart"
    raise UserError(
        f"The optimizer state of this checkpoint is in Megatron's format ({kind}), which cannot be "
        f"resumed in every layout. Start a new run from its weights with init_from=CHECKPOINT."
    )


def optimizer_sharded_state_dict(
    optimizer: MegatronOptimizer, model_state: Mapping[str, Any], *, is_loading: bool = False
) -> dict[str, Any]:
    """Return the sharded state dict of a Megatron optimizer. Every rank must call it.

    Args:
        optimizer: as ``get_megatron_optimizer`` returns it.
        model_state: the model's sharded state dict, which decides how the tensors are sharded.
        is_loading: whether a checkpoint will fill the result.

    Raises:
        UserError: for float16 loss scaling, whose state is not saved.
    """
    members = _members(optimizer)
    for member in members:
        _ensure_state(member)
        _correct_places(member)
    return {
        "step": None if is_loading else _common_step(members),
        "param_groups": [
            {key: value for key, value in group.items() if key not in ("params", "step")}
            for member in members
            if not member.is_stub_optimizer
            for group in member.optimizer.param_groups
        ],
        # Without empty parts: Megatron compares what the ranks have in common.
        "tensors": {
            str(index): tensors
            for index, member in enumerate(members)
            if (tensors := _sharded_tensors(member, model_state, is_loading))
        },
    }


def training_sharded_state_dict(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, *, is_loading: bool = False
) -> dict[str, Any]:
    """Return one sharded state dict of this rank's model chunks and their optimizer."""
    model = model_sharded_state_dict(chunks)
    return {
        "model": model,
        "optimizer": optimizer_sharded_state_dict(optimizer, model, is_loading=is_loading),
    }


def load_optimizer_state_dict(optimizer: MegatronOptimizer, state: Mapping[str, Any]) -> None:
    """Load what :func:`optimizer_sharded_state_dict` returned and a checkpoint has filled."""
    for index, member in enumerate(_members(optimizer)):
        if member.is_stub_optimizer:
            continue
        tensors = state["tensors"].get(str(index), {})
        saved = [_match(group, state["param_groups"]) for group in member.optimizer.param_groups]
        if isinstance(member, DistributedOptimizer):
            _load_distributed(member, tensors, saved)
        else:
            _load_plain(member, tensors, saved, state["step"])
        _set_step(member.optimizer, state["step"])


def _members(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return Megatron's optimizers of dense and expert parameters, on some stages empty."""
    chained = isinstance(optimizer, ChainedOptimizer)
    members = optimizer.chained_optimizers if chained else [optimizer]
    if any(getattr(member, "grad_scaler", None) is not None for member in members):
        raise UserError("The state of fp16 loss scaling cannot be saved: train in bf16 or fp32.")
    return members


def _ensure_state(member: MegatronOptimizer) -> None:
    """Create the zeros that the state is before the first step."""
    if member.is_stub_optimizer:
        return
    member.init_state_fn(member.optimizer, member.config)
    if _keeps_step_per_parameter(member.optimizer):
        for state in member.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _correct_places(member: MegatronOptimizer) -> None:
    """Correct where the distributed optimizer looks for the shard of each parameter.

    It puts the float32 parameters of a group before the others, which Megatron-Core 0.16.1 ignores
    when it records their positions.
    """
    if member.is_stub_optimizer or not isinstance(member, DistributedOptimizer):
        return
    groups = zip(member.model_fp32_groups, member.model_float16_groups, strict=True)
    for index, (wide, narrow) in enumerate(groups):
        for order, parameter in enumerate((*wide, *narrow)):
            member.model_param_group_index_map[parameter] = (index, order)


def _match(group: Mapping[str, Any], saved: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the saved settings of ``group``: learning rate, weight decay, betas and the like.

    Its schedule is that of the run's settings. Megatron-Core 0.19 refuses a checkpoint of another.
    """
    known = {tuple(old[key] for key in _GROUP_IDENTITY): old for old in reversed(saved)}
    wanted = tuple(group[key] for key in _GROUP_IDENTITY)
    if wanted not in known:
        raise UserError(
            f"The checkpoint's optimizer has no parameter group with {_GROUP_IDENTITY} = {wanted}; "
            f"it has {list(known)}."
        )
    return {key: value for key, value in known[wanted].items() if key not in _OF_SCHEDULE}


def _keeps_step_per_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Torch's Adam does; the fused ones of Transformer Engine and Apex keep one per group."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def _common_step(members: Sequence[MegatronOptimizer]) -> int:
    """Return the number of steps taken; ranks without a kind of parameter learn it from others."""
    steps = {0}
    for member in members:
        if member.is_stub_optimizer:
            continue
        if _keeps_step_per_parameter(member.optimizer):
            steps |= {int(state["step"]) for state in member.optimizer.state.values()}
        else:
            steps |= {int(group.get("step", 0)) for group in member.optimizer.param_groups}
    assert len(steps) <= 2, f"parameters have taken different numbers of steps: {steps}"
    most = torch.tensor(max(steps), dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def _set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    if _keeps_step_per_parameter(optimizer):
        for state in optimizer.state.values():
            state["step"] = torch.tensor(float(step))
    elif step:
        for group in optimizer.param_groups:
            group["step"] = step


def _sharded_tensors(
    member: MegatronOptimizer, model_state: Mapping[str, Any], is_loading: bool
) -> dict[Any, Any]:
    if member.is_stub_optimizer:
        return {}
    if isinstance(member, DistributedOptimizer):
        return _distributed_tensors(member, model_state, is_loading)
    return _plain_tensors(member, model_state)


def _plain_tensors(member: MegatronOptimizer, model_state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the moments, and the master weights of the float16 parameters."""
    optimizer = member.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not parameters:
        return {}
    model_parameters = {
        id(master): parameter
        for parameter_group, master_group in zip(*_float16_groups(member), strict=True)
        for parameter, master in zip(parameter_group, master_group, strict=True)
    }
    sharded = get_param_id_to_sharded_param_map(
        model_state, (model_parameters.get(id(p), p) for p in parameters)
    )
    moments = optimizer.state_dict()
    optim_state_to_sharding_state(moments, sharded, exclude_keys=("step",))
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    prefix = f"optimizer.state.{_MASTER_WEIGHT}"
    masters = {
        index: [
            make_sharded_optimizer_tensor(sharded[numbers[id(master)]], master, prefix)
            for master in group
        ]
        for index, group in enumerate(_float16_groups(member)[1])
        if group
    }
    return {"state": moments["state"], "masters": masters}


def _float16_groups(
    member: MegatronOptimizer,
) -> tuple[list[list[torch.nn.Parameter]], list[list[torch.Tensor]]]:
    """Return the float16 parameters and their float32 masters, by parameter group."""
    if isinstance(member, Float16OptimizerWithFloat16Params):
        return member.float16_groups, member.fp32_from_float16_groups
    return [], []


def _load_plain(
    member: MegatronOptimizer,
    tensors: Mapping[str, Any],
    saved: Sequence[dict[str, Any]],
    step: int,
) -> None:
    numbered = member.optimizer.state_dict()["param_groups"]
    moments = dict(tensors.get("state", {}))
    if _keeps_step_per_parameter(member.optimizer):
        moments["common_step"] = torch.tensor(float(step))  # Megatron gives each parameter a copy
    state: dict[str, Any] = {
        "state": moments,
        "param_groups": [
            {**group, **settings} for settings, group in zip(saved, numbered, strict=True)
        ],
    }
    if isinstance(member, Float16OptimizerWithFloat16Params):
        masters = tensors.get("masters", {})
        in_groups = [masters.get(index, []) for index in range(len(numbered))]
        state = {"optimizer": state, "fp32_from_fp16_params": in_groups}
    member.load_state_dict(state)


def _parameters_in_order(member: DistributedOptimizer) -> list[torch.nn.Parameter]:
    """Return the parameters in the order in which the distributed optimizer numbers its state."""
    return [parameter for buffer in member.buffers for parameter in buffer.param_index_map]


def _distributed_tensors(
    member: DistributedOptimizer, model_state: Mapping[str, Any], is_loading: bool
) -> dict[int, dict[str, Any]]:
    """Gather the shards of a data-parallel group to whole tensors, named as without sharding.

    The master weight of a float32 parameter is a view of it, and is saved with the model.
    """
    whole = member.sharded_param_state_fully_reshardable(
        model_state, is_loading, {"distrib_optim_fully_reshardable_mem_efficient": False}
    )
    for index, parameter in enumerate(_parameters_in_order(member)):
        master: ShardedTensor | ShardedTensorFactory = whole[index].pop("param")
        if parameter.dtype != torch.float32:
            key = master.key.replace(".param.", f".{_MASTER_WEIGHT}.", 1)
            whole[index][_MASTER_WEIGHT] = dataclasses.replace(master, key=key)
    return whole


def _load_distributed(
    member: DistributedOptimizer,
    tensors: Mapping[int, Mapping[str, torch.Tensor]],
    saved: Sequence[dict[str, Any]],
) -> None:
    optimizer = member.optimizer
    for state in optimizer.state.values():
        state.pop("step", None)  # Megatron would copy it, and does not read it
    whole = {
        index: {"param": parameter.detach(), **tensors[index]}
        if parameter.dtype == torch.float32
        else dict(tensors[index])
        for index, parameter in enumerate(_parameters_in_order(member))
    }
    member.load_parameter_state_from_fully_reshardable(whole)
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        group.update(settings)
