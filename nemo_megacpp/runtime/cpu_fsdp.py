"""What Megatron's FSDP needs beyond :mod:`cpu_megatron` to run without a GPU.

Its buffers, hooks and order of communication are the stock ones, on gloo.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from nemo_megacpp.runtime.cpu_collectives import one_by_one


class _TorchOnCpu(ModuleType):
    """Torch, in which ``device("cuda:…")`` is the CPU. Megatron writes the current device behind
    ``"cuda:"``, and a device, which is no class to derive from, cannot be written as a number."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(kind: Any, *index: Any) -> torch.device:
        if isinstance(kind, str) and kind.startswith("cuda"):
            return torch.device("cpu")
        return torch.device(kind, *index)


class _MeshOnCpu:
    """``DeviceMesh.from_group`` with the device that gloo's groups have."""

    @staticmethod
    def from_group(group: Any, device_type: str, **options: Any) -> Any:
        return torch.distributed.DeviceMesh.from_group(group, device_type="cpu", **options)


def _scale_then_sum(
    gradients: torch.Tensor, scaling_factor: float | None, ddp_config: Any
) -> torch.distributed.ReduceOp.RedOpType:
    """Stock form asks NCCL to multiply while it sums; gloo sums what is multiplied before."""
    if scaling_factor is None:
        return torch.distributed.ReduceOp.SUM
    if ddp_config.average_in_collective:
        return torch.distributed.ReduceOp.AVG
    gradients.mul_(scaling_factor)
    return torch.distributed.ReduceOp.SUM


def _state_of_all(state_of_some: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A save has collectives for each parameter that the optimizer has a state of. Transformer
    Engine's Adam makes one of every parameter; torch's, which stands in for it, of those with a
    gradient, so not where a rank has no element, and the ranks would wait for each other."""

    def state(optimizer: Any, is_loading: bool = False) -> dict[str, Any]:
        found = state_of_some(optimizer, is_loading)
        known = found["state"]
        if known:
            like = next(iter(known.values()))
            found["state"] = {
                name: known.get(name) or _empty_state(parameter, like)
                for group in optimizer.optimizer.param_groups
                for parameter in group["params"]
                for name in [optimizer._param_name(parameter)]
            }
        return found

    # nemo_megacpp.core.fsdp.problem_with_saving reads it.
    state.state_of_all = True  # type: ignore[attr-defined]
    return state


def _empty_state(parameter: torch.Tensor, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return Adam's state of a parameter of which the rank has no element."""
    return {
        name: torch.zeros_like(parameter.detach()) if value.dim() else value.clone()
        for name, value in like.items()
    }


def install() -> None:
    """Install the replacements. Called once, by :mod:`cpu_megatron`."""
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter
    from megatron.core.distributed.fsdp.src.megatron_fsdp import (
        megatron_fsdp,
        param_and_grad_buffer,
    )
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    modules: list[Any] = [mcore_fsdp_adapter, megatron_fsdp, param_and_grad_buffer]
    for module in modules:
        module.torch = _TorchOnCpu("torch")
    modules[0].DeviceMesh = _MeshOnCpu
    modules[2].gradient_reduce_preprocessing = _scale_then_sum
    modules[2]._coalescing_manager = one_by_one
    optimizer: Any = DistributedOptimizer
    optimizer.sharded_param_state_fsdp_dtensor = _state_of_all(
        optimizer.sharded_param_state_fsdp_dtensor
    )
