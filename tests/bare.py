"""Megatron's own parts without NeMo: what records and tests of single modules need.

No proof of a layout comes from here: those take the path that trains
(:mod:`nemo_megacpp.nemo.proof_run`). Here a step is nothing but Megatron's schedule and
optimizer, so that what it allocates and sends can be counted (:mod:`tests.record`)
without what NeMo logs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch.utils.data import default_collate

from nemo_megacpp.checkpoint.dcp import save_model
from nemo_megacpp.config import HybridConfig, config_fields
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.microbatch import deal_microbatch
from nemo_megacpp.proof.step_data import Rows
from nemo_megacpp.proof.step_result import ADAM_EPS, disturb
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.specs.hybrid_model import build_hybrid_chunks
from nemo_megacpp.specs.payload import schedule_seq_length


def device() -> torch.device:
    """Return this rank's GPU, or the CPU where there is none (:mod:`nemo_megacpp.runtime`)."""
    return torch.device(torch.cuda.current_device())


def make_config(spec: StepSpec, layout: ParallelLayout) -> HybridConfig:
    """Return the model configuration of ``spec`` in ``layout``."""
    dtype = getattr(torch, spec.dtype)
    return HybridConfig(**config_fields(spec.model, layout, dtype, "cpu"))


def build_chunks(config: HybridConfig, layout: ParallelLayout) -> list[torch.nn.Module]:
    """Build this rank's pipeline chunks, one per virtual stage, on its device.

    Mixers keep a few parameters in float32 (:mod:`nemo_megacpp.mixers.float32`). In a float64 model
    they become float64 here, so that their gradients are accumulated and reduced exactly as well;
    in a bfloat16 model they stay float32.
    """
    chunks = build_hybrid_chunks(config)
    for chunk in chunks:
        chunk.to(device())
        for parameter in chunk.parameters():
            wide = torch.promote_types(parameter.dtype, config.params_dtype)
            parameter.data = parameter.data.to(wide)
    return chunks


def save_initial_weights(spec: StepSpec, layout: ParallelLayout, directory: str) -> None:
    """Build the model of ``spec`` in ``layout`` (on every rank of it) and save its weights,
    disturbed."""
    start_model_parallel(layout, spec.seed)
    chunks = build_chunks(make_config(spec, layout), layout)
    disturb(spec, chunks)
    save_model(chunks, directory)


@dataclass
class Trainee:
    """What is trained on this rank.

    Attributes:
        spec: what a step computes.
        num_microbatches: of this rank.
        config: of the model.
        chunks: its pipeline chunks, one per virtual stage.
        wrapped: the same, each in Megatron's data-parallel wrapper, which owns the gradients.
        optimizer: over all of them.
    """

    spec: StepSpec
    num_microbatches: int
    config: HybridConfig
    chunks: list[torch.nn.Module]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer

    def forward_backward(self) -> Sequence[tuple[float, int]]:
        """Run Megatron's pipeline schedule over the global batch; gradients end up reduced.

        Returns:
            The sum of the losses and their number, for each microbatch that ends on this rank.
        """
        self.optimizer.zero_grad()
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[microbatches(self.spec) for _ in self.wrapped],
            model=self.wrapped,
            num_microbatches=self.num_microbatches,
            seq_length=schedule_seq_length(
                self.config.pattern.letters, self.config, self.config, self.config.seq_length
            ),
            micro_batch_size=self.spec.micro_batch_size,
            forward_only=False,
        )


def prepare(spec: StepSpec, layout: ParallelLayout) -> Trainee:
    """Build the model of ``spec`` in ``layout`` with its optimizer, ready for a step."""
    start_model_parallel(layout, spec.seed)
    config = make_config(spec, layout)
    chunks = build_chunks(config, layout)
    wrapped = _wrap(spec, config, chunks)
    count = spec.global_batch_size // (spec.micro_batch_size * layout.data_parallel_size)
    return Trainee(spec, count, config, chunks, wrapped, _optimizer(spec, config, wrapped))


def microbatches(spec: StepSpec) -> Iterator[dict[str, Any]]:
    """Yield this data-parallel rank's microbatches, dealt to its context-parallel rank."""
    rows, size = Rows(spec), spec.micro_batch_size
    dp, rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    for start in range(rank * size, spec.global_batch_size, dp * size):
        yield deal_microbatch(default_collate([rows[i] for i in range(start, start + size)]))


def forward_step(data: Iterator[dict[str, Any]], model: torch.nn.Module) -> tuple[Any, Any]:
    """Run one microbatch: Megatron's ``forward_step_func``, for the mean over its tokens.

    The schedule returns the sum of the losses and their number for each microbatch.
    """
    batch = next(data)
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        packed_seq_params=batch["packed_seq_params"],
        side_channels=batch["side_channels"],
    )
    return losses, _mean


def _mean(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[float, int]]:
    total, count = losses.sum(), losses.numel()
    return total, torch.tensor(count, dtype=torch.int), (float(total.detach()), count)


def _wrap(
    spec: StepSpec, config: HybridConfig, chunks: Sequence[torch.nn.Module]
) -> list[DistributedDataParallel]:
    """Wrap model chunks as Megatron's training does, and tell the schedules of it."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.bf16,
        use_distributed_optimizer=spec.use_distributed_optimizer,
        **spec.ddp,
    )
    wrapped = [
        DistributedDataParallel(
            config,
            ddp_config,
            Float16Module(config, chunk) if config.bf16 else chunk,
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in wrapped]
    if len(wrapped) == 1:
        config.no_sync_func = config.no_sync_func[0]
    return wrapped


def _optimizer(
    spec: StepSpec, config: HybridConfig, wrapped: list[DistributedDataParallel]
) -> MegatronOptimizer:
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=spec.learning_rate,
            weight_decay=0.01,
            adam_eps=ADAM_EPS,
            clip_grad=spec.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=spec.use_distributed_optimizer,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )
