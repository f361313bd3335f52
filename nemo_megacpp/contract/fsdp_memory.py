"""What a rank keeps under Megatron's FSDP, by sharding strategy: exact bytes of its buffers.

Each strategy keeps the float32 parameters and Adam's moments in shards; ``optim_grads`` the
gradients as well, and ``optim_grads_params`` the parameters too. FSDP groups and pads parameters by
rules of its own (:func:`nemo_megacpp.core.fsdp.fsdp_buffers`), and keeps the float32 parameters in
either precision. What it gathers for a layer and frees again is not part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_megacpp.contract.memory import GRADIENT_BYTES, Bucket, replicas_of
from nemo_megacpp.core.fsdp import FsdpBuffer, fsdp_buffers
from nemo_megacpp.formulas.sizes import Job
from nemo_megacpp.runtime.distributed import fake_rank
from nemo_megacpp.specs.backend import TorchBackend
from nemo_megacpp.specs.hybrid_model import build_hybrid_chunks

_BUCKET_ELEMENTS = 40_000_000
_BUCKET_ELEMENTS_PER_REPLICA = 1_000_000
_MOMENTS_BYTES = 8


@dataclass(frozen=True)
class FsdpMemory:
    """Bytes that a rank keeps between layers.

    Attributes:
        parameters: those that layers compute with, with padding.
        gradients: in float32, with padding.
        main_parameters: the float32 parameters that the optimizer steps, with padding.
        moments: Adam's state, of the elements in the rank's shards.
    """

    parameters: int
    gradients: int
    main_parameters: int
    moments: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.parameters + self.gradients + self.main_parameters + self.moments


def script_bucket_size(job: Job) -> int | None:
    """Return the elements after which Megatron's training closes a buffer (``training.py``)."""
    if not job.overlap_grad_reduce:
        return None
    return max(_BUCKET_ELEMENTS, _BUCKET_ELEMENTS_PER_REPLICA * replicas_of(job, False))


def job_buffers(job: Job, strategy: str, bucket_size: int | None) -> list[FsdpBuffer]:
    """Return the buffers of a rank of ``job``, which has one pipeline stage.

    Args:
        job: the job; the process must not have process groups.
        strategy: one of :data:`nemo_megacpp.core.fsdp.STRATEGIES`.
        bucket_size: elements after which a buffer is closed.
    """
    with fake_rank(job.layout, 0), torch.device("meta"):
        (chunk,) = build_hybrid_chunks(job.config(), TorchBackend())
        if job.precision == "bf16":
            chunk = chunk.bfloat16()  # as Megatron's Float16Module does
        replicas = replicas_of(job, False), replicas_of(job, True)
        return list(fsdp_buffers(chunk, strategy, bucket_size, *replicas))


def fsdp_memory(
    job: Job, strategy: str, buffers: Sequence[FsdpBuffer], dense: int, expert: int
) -> FsdpMemory:
    """Return what a rank keeps of ``buffers``.

    Args:
        job: the job.
        strategy: one of :data:`nemo_megacpp.core.fsdp.STRATEGIES`.
        buffers: of `job_buffers`.
        dense, expert: the rank's places in its ``dp-cp`` and ``edp`` groups.
    """
    # torch's Adam counts the steps of every parameter in a tensor; fused ones count once.
    per_parameter = 4 if job.kernels == "torch" else 0
    parameters = gradients = main_parameters = moments = 0
    for buffer in buffers:
        replicas = replicas_of(job, buffer.is_expert)
        share = buffer.numel // replicas
        parameters += buffer.element_size * (
            share if strategy == "optim_grads_params" else buffer.numel
        )
        gradients += GRADIENT_BYTES * (buffer.numel if strategy == "optim" else share)
        main_parameters += GRADIENT_BYTES * share
        place = expert if buffer.is_expert else dense
        elements, count = Bucket(buffer.numel, buffer.ranges).owned(replicas, place)
        moments += _MOMENTS_BYTES * elements + per_parameter * count
    return FsdpMemory(parameters, gradients, main_parameters, moments)


def largest_fsdp_memory(job: Job, strategy: str) -> FsdpMemory:
    """Return `fsdp_memory` of the rank that keeps most, in buffers of Megatron's own script."""
    buffers = job_buffers(job, strategy, script_bucket_size(job))
    found = []
    for is_expert in (False, True):
        mine = [buffer for buffer in buffers if buffer.is_expert == is_expert]
        places = range(replicas_of(job, is_expert)) if mine else range(1)
        kept = (fsdp_memory(job, strategy, mine, place, place) for place in places)
        found.append(max(kept, key=lambda memory: memory.total))
    dense, experts = found
    return FsdpMemory(
        dense.parameters + experts.parameters,
        dense.gradients + experts.gradients,
        dense.main_parameters + experts.main_parameters,
        dense.moments + experts.moments,
    )
