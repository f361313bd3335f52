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

from nemo_megacpp.errors import UserError

_MASTER, _MOMENT = "optimizer.state.fp32_param.", "optimizer.state.exp_avg."
_SHARDING = "distrib_optim_sharding_type"


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
    masters = {n.removeprefix(_MASTER) for n in names if n.startswith(_MASTER)}
    trained = {n.removeprefix(_MOMENT) for n in names if n.startswith(_MOMENT)}
    if masters and trained - masters:
        raise UserError(
            f"{directory} is of a bfloat16 model with float32 parameters, such as "
            f"{min(trained - masters)}. Megatron's script confuses the optimizer's states of some "
            f"of their parameters when it saves. Start a new run from its weights with "
            f"init_from={directory}."
        )


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


def consumed_samples(common: Mapping[str, Any]) -> int | None:
    """Return how many rows the script has trained on, None where it does not say."""
    found = getattr(common.get("args"), "consumed_train_samples", None)
    return found if isinstance(found, int) else None
