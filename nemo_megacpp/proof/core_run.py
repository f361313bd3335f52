"""The steps of a proof, taken by Megatron-Core alone.

Where NeMo is not installed, training goes through Megatron's own scripts or Megatron-Bridge. Both
drive what is driven here, in the order of Megatron's ``train_step``: its data-parallel wrapper,
pipeline schedules, ``finalize_model_grads``, optimizer and learning-rate schedule; and the
package's model, deal of a batch over cp and loss. Their argument parsing, data loaders and logging
are not part of it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch.utils.data import default_collate

from nemo_megacpp.checkpoint.folder import WEIGHTS
from nemo_megacpp.checkpoint.identity import STRUCTURE
from nemo_megacpp.checkpoint.lifecycle import finish_checkpoint
from nemo_megacpp.checkpoint.training_state import load_training_state, save_training_state
from nemo_megacpp.config import HybridConfig, config_fields
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.microbatch import deal_microbatch, run_microbatch
from nemo_megacpp.mixers.token_loss import batch_loss, microbatch_loss
from nemo_megacpp.proof.case_kernels import kernels_here, use_kernels
from nemo_megacpp.proof.case_runner import TrainingPath
from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.step_data import Rows, linear_form_step
from nemo_megacpp.proof.step_reader import StepReader
from nemo_megacpp.proof.step_result import ADAM_EPS, Carried, StepResult, checkpoint_of
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.host import current_host
from nemo_megacpp.specs.hybrid_model import build_hybrid_chunks
from nemo_megacpp.specs.payload import schedule_seq_length


def run_step(
    spec: StepSpec,
    layout: ParallelLayout,
    weights: GlobalValues | None = None,
    trace: bool = False,
    perturb_seed: int | None = None,
) -> StepResult | None:
    """Take the steps of ``spec`` in ``layout``, on every rank of it; see
    :func:`nemo_megacpp.nemo.proof_run.run_step`, which has the same arguments."""
    reader = StepReader(spec, weights, trace=trace, perturb_seed=perturb_seed)
    trainee = _Trainee.prepare(spec, layout, reader)
    trainee.begin(reader)
    trainee.train(reader)
    return reader.result


def train_and_save(
    spec: StepSpec,
    layout: ParallelLayout,
    run_dir: str,
    after: int,
    weights: GlobalValues | None = None,
) -> Carried | None:
    """Take the steps of ``spec``, and save a checkpoint when ``after`` of them are done, under
    ``run_dir`` (:func:`nemo_megacpp.proof.step_result.checkpoint_of`).

    Returns:
        On rank 0, the state that was saved and the steps that followed it.
    """
    reader = StepReader(spec, weights)
    trainee = _Trainee.prepare(spec, layout, reader)
    trainee.begin(reader)

    def save() -> None:
        with trainee.gathered():
            reader.gather_state()
            trainee.save(Path(checkpoint_of(run_dir, after)), after, layout)

    trainee.train(reader, at=after, do=save)
    return reader.carried


def resume_and_train(
    spec: StepSpec, layout: ParallelLayout, checkpoint: str, after: int
) -> Carried | None:
    """Resume a checkpoint of ``after`` steps in ``layout``, and take the remaining steps of
    ``spec``, if any.

    Returns:
        On rank 0, the state that was loaded and the steps that followed it.
    """
    reader = StepReader(spec, resumed=True)
    trainee = _Trainee.prepare(spec, layout, reader)
    load_training_state(trainee.chunks, trainee.optimizer, checkpoint)
    trainee.begin(reader)
    reader.gather_state()
    if spec.steps > after:
        trainee.train(reader, done=after)
    return reader.carried


@dataclass
class _Trainee:
    """What is trained on this rank."""

    spec: StepSpec
    num_microbatches: int
    config: HybridConfig
    chunks: list[torch.nn.Module]
    wrapped: list[Any]
    optimizer: MegatronOptimizer

    @classmethod
    def prepare(cls, spec: StepSpec, layout: ParallelLayout, reader: StepReader) -> _Trainee:
        """Build the model of ``spec`` in ``layout`` with its wrapper and optimizer. FSDP shards
        weights where it wraps them, so ``reader`` gives them before."""
        logging.getLogger("megatron").setLevel(logging.ERROR)  # as on NeMo's path
        start_model_parallel(layout, spec.seed)
        dtype = getattr(torch, spec.dtype)
        model = kernels_here(spec.dtype).fields(spec.model)
        config = HybridConfig(**config_fields(model, layout, dtype, current_host().device))
        chunks = build_hybrid_chunks(config, use_kernels(dtype))
        for chunk in chunks:
            chunk.to(torch.device(torch.cuda.current_device()))
            if dtype == torch.float64:
                # What mixers keep in float32 as well: gradients are then reduced exactly.
                for parameter in chunk.parameters():
                    parameter.data = parameter.data.double()
        if spec.ddp.get("use_megatron_fsdp"):
            reader.give_weights(chunks)
        wrapped = _wrap(spec, config, chunks)
        optimizer = _optimizer(spec, config, wrapped)
        config.grad_scale_func = optimizer.scale_loss
        count = spec.global_batch_size // (spec.micro_batch_size * layout.data_parallel_size)
        return cls(spec, count, config, chunks, wrapped, optimizer)

    def begin(self, reader: StepReader) -> None:
        """Let ``reader`` give the model its weights, if it has not, and watch it."""
        reader.begin(self.wrapped, self.config, self.optimizer)

    def train(
        self,
        reader: StepReader,
        done: int = 0,
        at: int | None = None,
        do: Callable[[], None] | None = None,
    ) -> None:
        """Take the steps after the first ``done``, and call ``do`` when ``at`` of them are done."""
        schedule = _schedule(self.spec, self.optimizer)
        if done:
            schedule.step(done)
        config = self.config
        rows = schedule_seq_length(config.pattern.letters, config, config, config.seq_length)
        for step in range(done + 1, self.spec.steps + 1):
            if at == step - 1 and do is not None:
                do()
            for chunk in self.wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            outputs = get_forward_backward_func()(
                forward_step_func=partial(_forward_step, self.spec, config),
                data_iterator=[microbatches(self.spec, step - 1) for _ in self.wrapped],
                model=self.wrapped,
                num_microbatches=self.num_microbatches,
                seq_length=rows,
                micro_batch_size=self.spec.micro_batch_size,
                forward_only=False,
            )
            if outputs:
                reader.add_loss(float(batch_loss([output["record"] for output in outputs])))
            reader.before_step(step)
            _, norm, _ = self.optimizer.step()
            schedule.step(1)
            norm = float("nan") if norm is None else float(norm)
            reader.after_step(step, self.num_microbatches, norm)
        if at == self.spec.steps and do is not None:
            do()
        reader.finish()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather the parameters first, which with ``overlap_param_gather`` would arrive in the next
        forward pass, as Megatron's training does before it saves."""
        ahead = [chunk for chunk in self.wrapped if chunk.ddp_config.overlap_param_gather]
        for chunk in ahead:
            chunk.disable_forward_pre_hook()
        yield
        for chunk in ahead:
            chunk.enable_forward_pre_hook()

    def save(self, directory: Path, step: int, layout: ParallelLayout) -> None:
        """Save a checkpoint that the package's commands can read."""
        save_training_state(self.chunks, self.optimizer, directory / WEIGHTS)
        if torch.distributed.get_rank() == 0:
            names = {*self.spec.model, *STRUCTURE, "hybrid_pattern", "side_channels"}
            model = {name: getattr(self.config, name) for name in names}
            identity = {"model": model, "layout": layout.short(), "tokenizer": None}
            finish_checkpoint(directory, identity, step)
        torch.distributed.barrier()


def microbatches(spec: StepSpec, step: int = 0) -> Iterator[dict[str, Any]]:
    """Yield this data-parallel rank's microbatches of a step
    (:func:`nemo_megacpp.mixers.microbatch.deal_microbatch`)."""
    rows, size = Rows(spec), spec.micro_batch_size
    dp, rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    first = step * spec.global_batch_size
    for start in range(first + rank * size, first + spec.global_batch_size, dp * size):
        yield deal_microbatch(default_collate([rows[i] for i in range(start, start + size)]))


def _forward_step(
    spec: StepSpec, config: HybridConfig, data: Iterator[dict[str, Any]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Run one microbatch: Megatron's ``forward_step_func``."""
    batch = next(data)
    if spec.objective == "logits":
        losses = linear_form_step(model, batch)
    else:
        losses = run_microbatch(model, batch)

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        per_token = config.calculate_per_token_loss
        total, count, record = microbatch_loss(losses, batch["loss_mask"], per_token)
        return total, count, {"record": record}

    return losses, loss


def _wrap(spec: StepSpec, config: HybridConfig, chunks: list[torch.nn.Module]) -> list[Any]:
    """Wrap model chunks as Megatron's training does, and tell the schedules of it."""
    exact, fsdp = spec.dtype == "float64", bool(spec.ddp.get("use_megatron_fsdp"))
    shards = fsdp or (spec.use_distributed_optimizer and not exact)
    settings = {
        "grad_reduce_in_fp32": not exact,
        "check_for_nan_in_grad": True,
        "use_distributed_optimizer": shards,
        "overlap_grad_reduce": True,
        "overlap_param_gather": shards,
        **spec.ddp,
    }
    if exact:
        settings["overlap_param_gather"] = False
    ddp_config = DistributedDataParallelConfig(**settings)
    wrapper: Any = FullyShardedDataParallel if fsdp else DistributedDataParallel
    wrapped = [
        wrapper(
            config,
            ddp_config,
            Float16Module(config, chunk) if config.bf16 else chunk,
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    functions: dict[str, list[Any]] = {}
    if ddp_config.overlap_grad_reduce:
        functions["no_sync_func"] = [chunk.no_sync for chunk in wrapped]
        if ddp_config.align_param_gather:
            functions["grad_sync_func"] = [chunk.start_grad_sync for chunk in wrapped]
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        functions["param_sync_func"] = [chunk.start_param_sync for chunk in wrapped]
    for name, of_chunks in functions.items():
        setattr(config, name, of_chunks[0] if len(wrapped) == 1 else of_chunks)
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def _optimizer(spec: StepSpec, config: HybridConfig, wrapped: list[Any]) -> MegatronOptimizer:
    ddp = wrapped[0].ddp_config
    settings = {
        "optimizer": "adam",
        "lr": spec.learning_rate,
        "min_lr": spec.learning_rate / 2,
        "weight_decay": 0.01,
        "adam_eps": ADAM_EPS,
        "clip_grad": spec.clip_grad,
        "bf16": config.bf16,
        "params_dtype": config.params_dtype,
        "use_distributed_optimizer": ddp.use_distributed_optimizer,
        "overlap_param_gather": ddp.overlap_param_gather,
        **spec.optimizer,
    }
    return get_megatron_optimizer(
        OptimizerConfig(**settings), wrapped, use_gloo_process_groups=False
    )


def _schedule(spec: StepSpec, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Return Megatron's learning-rate schedule: a cosine over the steps, to half the rate."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=spec.learning_rate,
        max_lr=spec.learning_rate,
        min_lr=spec.learning_rate / 2,
        lr_warmup_steps=0,
        lr_decay_steps=max(spec.steps, 1),
        lr_decay_style="cosine",
        start_wd=0.01,
        end_wd=0.01,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


CORE = TrainingPath(run_step, train_and_save, resume_and_train)
"""The path of Megatron's own scripts and of Megatron-Bridge, without their front ends."""
