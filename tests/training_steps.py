"""Several training steps on the ranks of a test, with settings of Megatron's data-parallel wrapper
and optimizer that the proof's one step does not have."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from nemo_megacpp.checkpoint.weights import load_weights
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.gather import gather_values
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.specs.hybrid_model import build_hybrid_chunks
from tests.bare import forward_step, make_config, microbatches

OVERLAPS: Mapping[str, Any] = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "bucket_size": 1,  # parameter: every tensor is a bucket of its own
}


class _LatestGather:
    """Stands for the handle of a bucket's gather, on a network that delivers no sooner than it
    must: the parameters arrive when somebody waits for them. What is read without waiting is then
    of the step before, every time."""

    def __init__(self, bucket_group: Any):
        self._bucket_group = bucket_group

    def wait(self) -> None:
        self._bucket_group.param_gather_handle = None
        type(self._bucket_group).start_param_sync(self._bucket_group, force_sync=True)

    @staticmethod
    def start(bucket_group: Any, force_sync: bool = False) -> None:
        """Take the place of ``start_param_sync`` of a bucket group."""
        if force_sync:
            type(bucket_group).start_param_sync(bucket_group, force_sync=True)
            return
        assert bucket_group.param_gather_handle is None
        bucket_group.param_gather_handle = _LatestGather(bucket_group)
        bucket_group.param_gather_dispatched = True


class Trained(NamedTuple):
    """What some steps gave, on rank 0.

    Attributes:
        losses: of every step, averaged over the global batch.
        norms: Megatron's gradient norm of every step.
        parameters: after the last step, in global shapes.
    """

    losses: list[float]
    norms: list[float]
    parameters: dict[str, np.ndarray]


def train(
    spec: StepSpec,
    layout: ParallelLayout,
    weights: str,
    ddp: Mapping[str, Any],
    steps: int = 3,
    backend: BackendSpecProvider | None = None,
) -> Trained | None:
    """Load ``weights`` in ``layout`` and take ``steps`` steps on the batch of ``spec``.

    Args:
        spec: what a step computes; float32.
        layout: where.
        weights: a folder that ``save_initial_weights`` wrote.
        ddp: fields of ``DistributedDataParallelConfig``.
        steps: how many.
        backend: where the modules come from; this installation's default if not given.
    """
    start_model_parallel(layout, spec.seed)
    config = make_config(spec, layout)
    chunks = build_hybrid_chunks(config, backend)
    ddp_config = DistributedDataParallelConfig(**ddp)
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    _tell_the_schedules(config, ddp_config, wrapped)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=spec.learning_rate,
            adam_eps=1e-2,
            clip_grad=1.0,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=ddp_config.use_distributed_optimizer,
            overlap_param_gather=ddp_config.overlap_param_gather,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )
    if ddp_config.overlap_param_gather:
        for chunk in wrapped:
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                group.start_param_sync = partial(_LatestGather.start, group)
    load_weights(chunks, weights)
    optimizer.reload_model_params()
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[microbatches(spec) for _ in wrapped],
            model=wrapped,
            num_microbatches=spec.global_batch_size
            // (spec.micro_batch_size * layout.data_parallel_size),
            seq_length=config.seq_length,
            micro_batch_size=spec.micro_batch_size,
            forward_only=False,
        )
        losses.append(mean_loss(outputs))
        norms.append(float(optimizer.step()[1]))
    if ddp_config.overlap_param_gather:
        for chunk in wrapped:
            chunk.disable_forward_pre_hook()
    gathered = gather_values(chunks)
    return None if gathered is None else Trained(losses, norms, gathered.values)


def _tell_the_schedules(config: Any, ddp: DistributedDataParallelConfig, wrapped: list) -> None:
    """Set the functions that Megatron's pipeline schedules call, as its training script does."""
    functions = {"no_sync_func": [chunk.no_sync for chunk in wrapped]}
    if ddp.align_param_gather:
        functions["param_sync_func"] = [chunk.start_param_sync for chunk in wrapped]
    config.finalize_model_grads_func = finalize_model_grads
    for name, of_chunks in functions.items():
        setattr(config, name, of_chunks[0] if len(wrapped) == 1 else of_chunks)


def mean_loss(outputs: Any) -> float:
    """Return the mean over the global batch of what Megatron's schedule returned."""
    sums = torch.zeros(2, dtype=torch.float64)
    for total, tokens in outputs:
        sums += sums.new_tensor([float(total), float(tokens)])
    for group in (
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
    ):
        torch.distributed.all_reduce(sums, group=group)
    return float(sums[0] / sums[1])
