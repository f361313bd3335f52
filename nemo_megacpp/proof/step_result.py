"""What training steps gave, and how it is read off the modules that trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import shard_buffer

from nemo_megacpp.proof.gather import GlobalValues, gather_values
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.proof.tag_check import TagViolation
from nemo_megacpp.proof.taps import Trace

ADAM_EPS = 1e-2
"""The eps of every proof's Adam, whose first step is the sign of the gradient where that is large
against eps: with the usual 1e-8, the rounding of a gradient that should be zero would become a
whole step."""


@dataclass
class StepResult:
    """What the steps gave, on rank 0, in global shapes.

    Attributes:
        losses: of each step: what was differentiated, averaged over the global batch.
        grad_norms: of each step: Megatron's gradient norm.
        aux_losses: auxiliary losses by name, averaged over E blocks and microbatches; with several
            steps by name and step.
        gradients: gradient of every parameter in the first step, and with several steps in the
            last, whose keys end in ``@N``.
        parameters: every saved tensor after the last step; of a bfloat16 parameter the optimizer's
            float32 main parameter (:mod:`nemo_megacpp.proof.main_parameters`).
        trace: the tensors inside the model, if they were recorded.
        initial: every saved tensor before the first step, if the run drew them itself.
        tag_violations: parameters whose tags do not agree with what ranks hold of them.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    aux_losses: dict[str, float] = field(default_factory=dict)
    gradients: GlobalValues = field(default_factory=GlobalValues)
    parameters: GlobalValues = field(default_factory=GlobalValues)
    trace: Trace | None = None
    initial: GlobalValues = field(default_factory=GlobalValues)
    tag_violations: Sequence[TagViolation] = ()


@dataclass
class Carried:
    """A training state that was saved or loaded, and the steps that follow it, on rank 0.

    Attributes:
        state: every weight, buffer, moment and master weight in global shape, by checkpoint key.
        steps: the number of steps that the optimizer of each rank has taken.
        settings: the settings of the parameter groups.
        following: what the training steps after it gave.
    """

    state: GlobalValues
    steps: int
    settings: list[dict] = field(default_factory=list)
    following: StepResult | None = None


def checkpoint_of(run_dir: str, step: int) -> str:
    """Return the path of a run's checkpoint of ``step``."""
    return str(Path(run_dir) / "checkpoints" / f"step={step}")


def disturb(spec: StepSpec, chunks: Sequence[torch.nn.Module]) -> None:
    """Add a little noise to every parameter.

    Gains, decays and skips start at constants, which would hide a permutation of heads.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.05 * noise.to(parameter))
            for name, buffer in chunk.named_buffers():
                if name.endswith("expert_bias"):
                    buffer[list(spec.starved_experts)] = -1e3


def gather_gradients(
    chunks: Sequence[torch.nn.Module], wrapped: Sequence[DistributedDataParallel]
) -> GlobalValues | None:
    """Gather the reduced gradient of every parameter to rank 0, before the optimizer steps.

    With the distributed optimizer each data-parallel rank has reduced a shard of every bucket, so
    the shards are gathered into the buckets first. Nothing reads the other shards afterwards.

    Args:
        chunks: this rank's model chunks, unwrapped.
        wrapped: the same in Megatron's data-parallel wrapper.
    """
    for chunk in wrapped:
        if chunk.ddp_config.use_distributed_optimizer:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                _gather_shards(buffer)
    gradients: dict[int, Any] = {
        id(parameter): parameter.main_grad for chunk in chunks for parameter in chunk.parameters()
    }
    return gather_values(chunks, lambda tensor: gradients.get(id(tensor)))


def _gather_shards(buffer: Any) -> None:
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        shard = shard_buffer(bucket.grad_data, group.size())[group.rank()].clone()
        torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)
