"""One training step of a model in a layout, with Megatron's own schedule and optimizer."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from nemo_megacpp.checkpoint.dcp import load_model, save_model
from nemo_megacpp.config import HybridConfig
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.aux_loss import reduced_aux_losses
from nemo_megacpp.proof.gather import GlobalValues, gather_values
from nemo_megacpp.proof.kernels import kernels_here, use_kernels
from nemo_megacpp.proof.objective import device, forward_step, microbatches
from nemo_megacpp.proof.perturb import perturb
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.proof.tag_rules import Violation
from nemo_megacpp.proof.tags import tag_violations
from nemo_megacpp.proof.trace import Recorder, Trace
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.specs.model import build_hybrid_chunks

# Adam's first step is the sign of the gradient wherever that is large against eps: with the usual
# 1e-8, the rounding of a gradient that ought to be zero would become a whole step.
_ADAM_EPS = 1e-2


@dataclass
class StepResult:
    """What a step gave, on rank 0, in global shapes.

    Attributes:
        objective: the loss or the linear form, averaged over the global batch.
        aux_losses: auxiliary losses by name, averaged over E blocks and microbatches.
        grad_norm: Megatron's gradient norm.
        gradients: gradient of every parameter; none with the distributed optimizer, which leaves
            each data-parallel rank a shard of the sums.
        parameters: every saved tensor after the step (the optimizer's float32 copy in bfloat16).
        trace: the tensors inside the model, if they were asked for.
        tag_violations: parameters whose tags do not agree with what ranks hold of them.
    """

    objective: float
    aux_losses: dict[str, float]
    grad_norm: float
    gradients: GlobalValues = field(default_factory=GlobalValues)
    parameters: GlobalValues = field(default_factory=GlobalValues)
    trace: Trace | None = None
    tag_violations: Sequence[Violation] = ()


def make_config(spec: StepSpec, layout: ParallelLayout) -> HybridConfig:
    """Return the model configuration of ``spec`` in ``layout``."""
    dtype = getattr(torch, spec.dtype)
    return HybridConfig(
        **kernels_here(dtype).fields(spec.model),
        **layout.megatron_fields(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        moe_router_dtype="fp64" if dtype == torch.float64 else "fp32",
    )


def build_chunks(config: HybridConfig, layout: ParallelLayout) -> list[torch.nn.Module]:
    """Build this rank's pipeline chunks, one per virtual stage, on its device and in one dtype.

    Megatron keeps a few parameters of its Mamba mixer in float32; in a float64 model they become
    float64 here, so that their gradients are accumulated and reduced exactly as well, and in a
    bfloat16 model bfloat16, as Megatron's ``Float16Module`` has it.
    """
    chunks = build_hybrid_chunks(config, use_kernels(config.params_dtype))
    for chunk in chunks:
        chunk.to(device())
        for parameter in chunk.parameters():
            parameter.data = parameter.data.to(config.params_dtype)
    return chunks


def save_initial_weights(spec: StepSpec, layout: ParallelLayout, directory: str) -> None:
    """Build the model of ``spec`` in ``layout`` (on every rank of it) and save its weights,
    disturbed."""
    start_model_parallel(layout, spec.seed)
    chunks = build_chunks(make_config(spec, layout), layout)
    disturb(spec, chunks)
    save_model(chunks, directory)


def disturb(spec: StepSpec, chunks: Sequence[torch.nn.Module]) -> None:
    """Move every parameter off its start by a little noise.

    Gains, decays and skips start at ones or constants, which would hide a permutation of heads.
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


def round_trip(
    spec: StepSpec, layout: ParallelLayout, weights: str, save_to: str | None
) -> dict[str, str]:
    """Load ``weights`` in ``layout``, save them to ``save_to`` if it is given, and return (on rank
    0) a digest of every tensor in global shape."""
    start_model_parallel(layout, spec.seed)
    chunks = build_chunks(make_config(spec, layout), layout)
    load_model(chunks, weights)
    if save_to is not None:
        save_model(chunks, save_to)
    gathered = gather_values(chunks)
    values = {} if gathered is None else gathered.values
    return {key: hashlib.sha256(value.tobytes()).hexdigest() for key, value in values.items()}


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

    def forward_backward(self) -> Sequence[tuple[torch.Tensor, int]]:
        """Run Megatron's pipeline schedule over the global batch; gradients end up reduced."""
        self.optimizer.zero_grad()
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        return get_forward_backward_func()(
            forward_step_func=partial(forward_step, self.spec),
            data_iterator=[microbatches(self.spec, self.config) for _ in self.wrapped],
            model=self.wrapped,
            num_microbatches=self.num_microbatches,
            seq_length=self.config.seq_length,
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
    optimizer = _optimizer(spec, config, wrapped)
    return Trainee(spec, count, config, chunks, wrapped, optimizer)


def run_step(
    spec: StepSpec,
    layout: ParallelLayout,
    weights: str,
    trace: bool = False,
    perturb_seed: int | None = None,
) -> StepResult | None:
    """Load ``weights`` in ``layout``, run one training step; return what it gave on rank 0.

    Args:
        spec: what to compute.
        layout: where.
        weights: a folder that :func:`save_initial_weights` wrote.
        trace: record the tensors inside the model as well.
        perturb_seed: move the activations within bfloat16 rounding, with these random signs.
    """
    trainee = prepare(spec, layout)
    violations = tag_violations(trainee.chunks)
    load_model(trainee.chunks, weights)
    trainee.optimizer.reload_model_params()
    if perturb_seed is not None:
        perturb(trainee.chunks, trainee.config, perturb_seed)
    recorder = None
    if trace:
        recorder = Recorder(
            trainee.chunks, trainee.config, spec.micro_batch_size, spec.global_batch_size
        )
    result = take_step(trainee)
    traced = None if recorder is None else recorder.gather()
    if result is None:
        return None
    return dataclasses.replace(result, trace=traced, tag_violations=violations)


def take_step(trainee: Trainee) -> StepResult | None:
    """Run one training step on the batch of the spec; return what it gave on rank 0."""
    spec, config, chunks = trainee.spec, trainee.config, trainee.chunks
    outputs = trainee.forward_backward()
    objective = _global_mean(outputs)
    aux_losses = reduced_aux_losses(config, scale=1.0 / trainee.num_microbatches)
    main_grads = {
        id(p): p.main_grad
        for chunk in chunks
        for p in chunk.parameters()
        if not spec.use_distributed_optimizer
    }
    gradients = gather_values(chunks, lambda tensor: main_grads.get(id(tensor)))
    _, grad_norm, _ = trainee.optimizer.step()
    parameters = gather_values(chunks, lambda tensor: getattr(tensor, "main_param", tensor))
    if gradients is None or parameters is None:
        return None
    return StepResult(objective, aux_losses, float(grad_norm), gradients, parameters)


def _wrap(
    spec: StepSpec, config: HybridConfig, chunks: Sequence[torch.nn.Module]
) -> list[DistributedDataParallel]:
    """Wrap model chunks as Megatron's training does, and tell the schedules of it."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.bf16,
        use_distributed_optimizer=spec.use_distributed_optimizer,
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
            adam_eps=_ADAM_EPS,
            clip_grad=spec.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=spec.use_distributed_optimizer,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )


def _global_mean(outputs: Sequence[tuple[torch.Tensor, int]]) -> float:
    """Average over all tokens of the global batch, known on every rank."""
    sums = torch.zeros(2, dtype=torch.float64, device=device())
    for total, tokens in outputs:
        sums += sums.new_tensor([float(total), float(tokens)])
    torch.distributed.all_reduce(
        sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    torch.distributed.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    return float(sums[0] / sums[1])
