"""Faults made on purpose, inside the ranks that run a layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from megatron.core import parallel_state
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.ssm.mamba_context_parallel import _all_to_all_cp2hp
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from nemo_megacpp.mixers import m2rnn_mixer
from nemo_megacpp.mixers.kernels.block_attention import attend_backward
from nemo_megacpp.mixers.replicated import mark_replicated
from nemo_megacpp.mixers.sequence_layout import sequence_to_heads
from nemo_megacpp.runtime.workers import WorkerPool


def _dense_tags(experts: Any) -> None:
    """What stock Megatron-Core 0.16.1 does with EP=1, whatever the expert-tensor-parallel size."""
    for parameter in experts.parameters():
        parameter.allreduce = True


def _swapped_norm(self: Any, y: Any) -> Any:
    """Swap the first two heads of every tensor-parallel rank but the first."""
    if self.tp_group.rank() > 0:
        first, second, rest = y.split([self.v_dim, self.v_dim, y.size(-1) - 2 * self.v_dim], -1)
        y = m2rnn_mixer.torch.cat([second, first, rest], -1)
    return _norm(self, y)


_norm = m2rnn_mixer.M2RNNMixer._norm


def _zigzag(x: Any, cp_group: Any, order: Any) -> Any:
    """Exchange tokens for heads and leave the tokens in the order in which they came."""
    return _all_to_all_cp2hp(x, cp_group)


def _zigzag_under_tp(x: Any, cp_group: Any, order: Any) -> Any:
    """Undo the zigzag only where there is no tensor parallelism."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        return _all_to_all_cp2hp(x, cp_group)
    return sequence_to_heads(x, cp_group, order)


def _tagged_as_split(parameter: Any, config: Any) -> None:
    """Tag rows that every tensor-parallel rank holds as if each held its own."""
    mark_replicated(parameter, config)
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)


def _own_block_alone(*tensors: Any) -> None:
    """Leave out what this rank's queries add to the gradient of another rank's keys and values."""
    *others, d_key, d_value, dropout = tensors
    if not others[3][0].causal:
        d_key, d_value = d_key.clone(), d_value.clone()
    attend_backward(*others, d_key, d_value, dropout)


def _wrong_shard(self: Any) -> None:
    """Step the shard of the last data-parallel rank 1e-3 too far, and copy it to the parameters."""
    if self.data_parallel_group.rank() == self.data_parallel_group.size() - 1:
        halves = [g for g in self.shard_fp32_from_float16_groups if g]
        for group in halves or self.shard_fp32_groups:
            for shard in group:
                shard.data.mul_(1 + 1e-3)
    _copy_to_parameters(self)


def _stale_shard(self: Any) -> None:
    """Leave the parameters of the last data-parallel rank's shard as they were before the step."""
    if self.data_parallel_group.rank() < self.data_parallel_group.size() - 1:
        _copy_to_parameters(self)


_copy_to_parameters = DistributedOptimizer._copy_main_params_to_model_params


def _stale_gather(self: Any, force_sync: bool = False) -> None:
    """On the last rank, put back the parameters as they were before their gather."""
    before = [bucket.param_data.clone() for bucket in self.buckets]
    _gather(self, force_sync=True)
    if parallel_state.get_data_parallel_rank() > 0:
        for bucket, data in zip(self.buckets, before, strict=True):
            bucket.param_data.copy_(data)


_gather = _ParamAndGradBucketGroup.start_param_sync

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_BUCKETS = "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup"

FAULTS: dict[str, tuple[str, Any]] = {
    "step of a shard wrong by 1e-3": (
        f"{_OPTIMIZER}._copy_main_params_to_model_params",
        _wrong_shard,
    ),
    "shard not copied to the parameters": (
        f"{_OPTIMIZER}._copy_main_params_to_model_params",
        _stale_shard,
    ),
    "gather of parameters not received": (f"{_BUCKETS}.start_param_sync", _stale_gather),
    "gradient of a block in the ring not summed": (
        "nemo_megacpp.mixers.ring_attention.attend_backward",
        _own_block_alone,
    ),
    "expert weights tagged as dense": (
        "nemo_megacpp.mixers.experts.tag_expert_weights",
        _dense_tags,
    ),
    "gradient of replicated rows not summed": (
        "nemo_megacpp.mixers.linear.mark_replicated",
        lambda parameter, config: None,
    ),
    "replicated rows tagged as split": (
        "nemo_megacpp.mixers.linear.mark_replicated",
        _tagged_as_split,
    ),
    "zigzag not undone": ("nemo_megacpp.mixers.m2rnn_mixer.sequence_to_heads", _zigzag),
    "zigzag not undone under TP": (
        "nemo_megacpp.mixers.m2rnn_mixer.sequence_to_heads",
        _zigzag_under_tp,
    ),
    "two heads swapped": ("nemo_megacpp.mixers.m2rnn_mixer.M2RNNMixer._norm", _swapped_norm),
}


def run_broken(fault: str, task: Callable[..., Any], *args: Any) -> Any:
    """Run ``task(*args)`` in this process with a fault of ``FAULTS`` in place."""
    target, replacement = FAULTS[fault]
    with mock.patch(target, replacement):
        return task(*args)


class BrokenRanks(WorkerPool):
    """The ranks of another pool, with a fault wherever more than one of them run."""

    def __init__(self, ranks: WorkerPool, fault: str):
        self._ranks, self._fault, self.device = ranks, fault, ranks.device

    def run(self, world_size: int, task: Callable[..., Any], *args: Any) -> list[Any]:
        if world_size == 1:
            return self._ranks.run(1, task, *args)
        return self._ranks.run(world_size, run_broken, self._fault, task, *args)
