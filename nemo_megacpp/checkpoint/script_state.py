"""What Megatron's own script saves beside the weights, in the package's terms.

Without its distributed optimizer the script saves every moment and master weight in the shape of
its parameter and under the names that :mod:`nemo_megacpp.checkpoint.optimizer_state` gives them;
step and settings stand elsewhere: once per optimizer (of dense parameters, of experts), inside its
state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_megacpp.errors import UserError

_MASTER, _MOMENT = "optimizer.state.fp32_param.", "optimizer.state.exp_avg."
_SHARDING = "distrib_optim_sharding_type"
FORM = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""Content metadata that the script gives a checkpoint, without its distributed optimizer."""


def is_script_form(metadata: Mapping[str, Any] | None) -> bool:
    """Return whether optimizer state that Megatron saved has a form that every layout loads.

    Args:
        metadata: the checkpoint's content metadata.
    """
    return bool(metadata and metadata.get("chained_optim_avoid_prefix")) and (
        _SHARDING not in (metadata or {})
    )


def validate_script_optimizer(directory: Path, names: Collection[str]) -> None:
    """Refuse what the script saved of a bfloat16 model that also has float32 parameters, such as
    the decays of M and R: Megatron then saves the states of some parameters as those of others.

    Args:
        directory: the checkpoint, for the error.
        names: of its tensors.

    Raises:
        UserError: the model has parameters with and without a master weight.
    """
    if (wide := float32_among_masters(names)) is not None:
        raise UserError(
            f"{directory} is of a bfloat16 model with float32 parameters, such as {wide}. "
            f"Megatron's script confuses the optimizer's states of some of their parameters when "
            f"it saves. Start a new run from its weights with init_from={directory}."
        )


def has_masters(names: Collection[str]) -> bool:
    """Return whether any of the tensors ``names`` is a float32 master weight."""
    return any(name.startswith(_MASTER) for name in names)


def float32_among_masters(names: Collection[str]) -> str | None:
    """Return a parameter that is trained without a master weight where others have one; None where
    all are alike.

    Args:
        names: of a checkpoint's tensors.
    """
    masters = {n.removeprefix(_MASTER) for n in names if n.startswith(_MASTER)}
    trained = {n.removeprefix(_MOMENT) for n in names if n.startswith(_MOMENT)}
    return min(trained - masters, default=None) if masters else None


def common_optimizer(held: Any) -> dict[str, Any]:
    """Return ``step`` and ``param_groups`` of a checkpoint's optimizer.

    Args:
        held: what the ranks have in common of it, as the package, NeMo or Megatron's script nests
            it.

    Raises:
        UserError: the step is not there.
    """
    steps, groups = set(), []
    for member in _members(held):
        groups += member["param_groups"]
        state = member.get("state", {})
        if (step := member.get("step", state.get("common_step"))) is not None:
            steps.add(int(step))
        steps |= {int(group["step"]) for group in member["param_groups"] if group.get("step")}
    if not steps:
        raise UserError("The optimizer state of the checkpoint does not say its step.")
    return {"step": max(steps), "param_groups": groups}


def _members(held: Any) -> Iterator[dict[str, Any]]:
    """Yield the dictionaries of single optimizers, dense parameters first."""
    if isinstance(held, list | tuple):
        for item in held:
            yield from _members(item)
    elif isinstance(held, Mapping):
        if "param_groups" in held:
            yield dict(held)
        elif "optimizer" in held:  # of bfloat16 parameters
            yield from _members(held["optimizer"])
        else:
            for key in sorted(held, key=str):
                yield from _members(held[key])


def script_optimizer(common: Mapping[str, Any], *, masters: bool) -> dict[Any, Any]:
    """Return what the script's ranks have in common of an optimizer: the inverse of
    :func:`common_optimizer`.

    Args:
        common: what that function returns.
        masters: whether the parameters have float32 master weights.
    """
    kinds: dict[bool, list[dict[str, Any]]] = {}
    for group in common["param_groups"]:
        kinds.setdefault(bool(group["is_expert_parallel"]), []).append(group)
    members: list[dict[str, Any]] = [
        _script_member(kinds[expert], common["step"]) for expert in sorted(kinds)
    ]
    if masters:
        members = [{"optimizer": member} for member in members]
    return members[0] if len(members) == 1 else dict(enumerate(members))


def _script_member(groups: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """Put the step where the optimizer that was saved reads it: Transformer Engine's keeps one in
    each group, torch's one with each parameter."""
    if all("bias_correction" in group for group in groups):
        return {"state": {}, "param_groups": [{**group, "step": step} for group in groups]}
    return {"state": {"common_step": torch.tensor(float(step))}, "param_groups": groups}


def consumed_samples(common: Mapping[str, Any]) -> int | None:
    """Return how many rows the script has trained on, None where it does not say."""
    found = getattr(common.get("args"), "consumed_train_samples", None)
    return found if isinstance(found, int) else None
