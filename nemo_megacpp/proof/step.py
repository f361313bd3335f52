"""One training step of a model in a layout, with Megatron's own schedule and optimizer."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

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
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from nemo_megacpp.checkpoint.dcp import load_model, save_model
from nemo_megacpp.config import HybridConfig
from nemo_megacpp.layout import ParallelLayout, padded_vocab_size
from nemo_megacpp.mixers.aux_loss import reduced_aux_losses
from nemo_megacpp.mixers.sequence_layout import deal_batch
from nemo_megacpp.proof.gather import GlobalValues, gather_values
from nemo_megacpp.proof.perturb import perturb
from nemo_megacpp.proof.trace import Recorder, Trace
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.specs.model import build_hybrid_chunks

Objective = Literal["loss", "logits"]
Dtype = Literal["float64", "float32", "bfloat16"]

# Adam's first step is the sign of the gradient wherever that is large against eps: with the usual
# 1e-8, the rounding of a gradient that ought to be zero would become a whole step.
_ADAM_EPS = 1e-2


@dataclass(frozen=True)
class StepSpec:
    """What one step computes, apart from the layout.

    Attributes:
        model: fields of :class:`HybridConfig`, without the layout's.
        micro_batch_size, global_batch_size: rows per microbatch and per step.
        objective: ``loss`` is Megatron's cross entropy (which computes in float32); ``logits`` is a
            fixed random linear form of the logits, exact in the model's own dtype.
        dtype: of parameters and activations; ``bfloat16`` is Megatron's mixed precision: gradients
            are accumulated and reduced, and the optimizer steps, in float32.
        seed: of tokens, initial weights and the linear form.
        learning_rate: of the one Adam step.
        documents: lengths of the documents that each row packs; empty for rows of one document.
        starved_experts: experts whose routing bias is set so low that no token reaches them.
        use_distributed_optimizer: shard the optimizer's state over data-parallel ranks.
    """

    model: dict[str, Any]
    micro_batch_size: int = 1
    global_batch_size: int = 4
    objective: Objective = "loss"
    dtype: Dtype = "float32"
    seed: int = 7
    learning_rate: float = 1e-2
    documents: tuple[int, ...] = ()
    starved_experts: tuple[int, ...] = ()
    use_distributed_optimizer: bool = False

    @property
    def clip_grad(self) -> float:
        """Megatron computes the gradient norm in float32, so clipping by it would bring float32
        rounding into a float64 step: there the bound is out of reach."""
        return 1.0 if self.objective == "loss" else 1e9


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
    """

    objective: float
    aux_losses: dict[str, float]
    grad_norm: float
    gradients: GlobalValues = field(default_factory=GlobalValues)
    parameters: GlobalValues = field(default_factory=GlobalValues)
    trace: Trace | None = None


def make_config(spec: StepSpec, layout: ParallelLayout) -> HybridConfig:
    """Return the model configuration of ``spec`` in ``layout``."""
    dtype = getattr(torch, spec.dtype)
    return HybridConfig(
        **spec.model,
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
    chunks = build_hybrid_chunks(config)
    for chunk in chunks:
        chunk.to(_device())
        for parameter in chunk.parameters():
            parameter.data = parameter.data.to(config.params_dtype)
    return chunks


def _device() -> torch.device:
    """Return this rank's GPU, or the CPU where there is none (:mod:`nemo_megacpp.runtime`)."""
    return torch.device(torch.cuda.current_device())


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
        config: of the model.
        chunks: its pipeline chunks, one per virtual stage.
        wrapped: the same, each in Megatron's data-parallel wrapper.
        optimizer: over all of them.
    """

    config: HybridConfig
    chunks: list[torch.nn.Module]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer


def prepare(spec: StepSpec, layout: ParallelLayout) -> Trainee:
    """Build the model of ``spec`` in ``layout`` with its optimizer, ready for a step."""
    start_model_parallel(layout, spec.seed)
    config = make_config(spec, layout)
    chunks = build_chunks(config, layout)
    wrapped = _wrap(spec, config, chunks)
    return Trainee(config, chunks, wrapped, _optimizer(spec, config, wrapped))


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
    load_model(trainee.chunks, weights)
    trainee.optimizer.reload_model_params()
    if perturb_seed is not None:
        perturb(trainee.chunks, trainee.config, perturb_seed)
    recorder = None
    if trace:
        recorder = Recorder(
            trainee.chunks, trainee.config, spec.micro_batch_size, spec.global_batch_size
        )
    result = take_step(spec, layout, trainee)
    traced = None if recorder is None else recorder.gather()
    return None if result is None else dataclasses.replace(result, trace=traced)


def take_step(spec: StepSpec, layout: ParallelLayout, trainee: Trainee) -> StepResult | None:
    """Run one training step on the batch of ``spec``; return what it gave on rank 0."""
    config, chunks, wrapped = trainee.config, trainee.chunks, trainee.wrapped
    trainee.optimizer.zero_grad()
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    microbatches = spec.global_batch_size // (spec.micro_batch_size * layout.data_parallel_size)
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, spec),
        data_iterator=[_microbatches(spec, config) for _ in wrapped],
        model=wrapped,
        num_microbatches=microbatches,
        seq_length=config.seq_length,
        micro_batch_size=spec.micro_batch_size,
        forward_only=False,
    )
    objective = _global_mean(outputs)
    aux_losses = reduced_aux_losses(config, scale=1.0 / microbatches)
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


def _microbatches(spec: StepSpec, config: HybridConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this data-parallel rank's microbatches, sliced for its context-parallel rank."""
    generator = torch.Generator().manual_seed(spec.seed)
    rows = torch.randint(
        config.vocab_size, (spec.global_batch_size, config.seq_length + 1), generator=generator
    )
    dp = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    step = spec.micro_batch_size
    for start in range(rank * step, spec.global_batch_size, dp * step):
        part = rows[start : start + step]
        batch = {
            "tokens": part[:, :-1].contiguous(),
            "labels": part[:, 1:].contiguous(),
            "row": torch.arange(start, start + step)[:, None].expand(-1, config.seq_length),
            "position_ids": torch.arange(config.seq_length).expand(step, -1),
        }
        batch = {name: tensor.to(_device()) for name, tensor in batch.items()}
        yield deal_batch(batch, _packs(spec.documents))


def _forward_step(
    spec: StepSpec, data: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    labels = batch["labels"] if spec.objective == "loss" else None
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=labels,
        packed_seq_params=_packs(spec.documents),
    )
    if spec.objective == "loss":
        return output, partial(_mean_loss, batch)
    return output, partial(_linear_form, spec, model, batch)


def _packs(documents: Sequence[int]) -> PackedSeqParams | None:
    if not documents:
        return None
    ends = torch.tensor([0, *documents], dtype=torch.int32, device=_device())
    ends = ends.cumsum(0, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(documents),
        max_seqlen_kv=max(documents),
    )


def _mean_loss(batch: dict[str, torch.Tensor], losses: torch.Tensor) -> tuple:
    tokens = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    total = losses.sum()
    return total, tokens, (total.detach().double(), int(tokens))


def _linear_form(
    spec: StepSpec, model: torch.nn.Module, batch: dict[str, torch.Tensor], logits: torch.Tensor
) -> tuple:
    """Return ``Σ c·logits`` over this rank's rows, positions and vocabulary slice ``[b, s, v/tp]``.

    The coefficients depend on the global row, position and vocabulary index only.
    """
    config = model.config  # type: ignore[attr-defined]
    vocab = padded_vocab_size(
        config.vocab_size,
        config.make_vocab_size_divisible_by,  # type: ignore[arg-type]
        config.tensor_model_parallel_size,  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(spec.seed + 1)
    shape = (spec.global_batch_size, config.seq_length, vocab)  # type: ignore[arg-type]
    coefficients = torch.randn(shape, generator=generator, dtype=torch.float64).to(logits)
    rank, width = parallel_state.get_tensor_model_parallel_rank(), logits.size(-1)
    mine = coefficients[batch["row"], batch["position_ids"], rank * width : (rank + 1) * width]
    total = (mine * logits).sum()
    tokens = torch.tensor(batch["row"].numel(), dtype=torch.int, device=logits.device)
    whole = total.detach().double().clone()
    torch.distributed.all_reduce(whole, group=parallel_state.get_tensor_model_parallel_group())
    return total, tokens, (whole, int(tokens))


def _global_mean(outputs: Sequence[tuple[torch.Tensor, int]]) -> float:
    """Average over all tokens of the global batch, known on every rank."""
    sums = torch.zeros(2, dtype=torch.float64, device=_device())
    for total, tokens in outputs:
        sums += sums.new_tensor([float(total), float(tokens)])
    torch.distributed.all_reduce(
        sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    torch.distributed.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    return float(sums[0] / sums[1])
