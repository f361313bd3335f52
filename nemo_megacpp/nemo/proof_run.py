"""The steps of a proof, taken by the path that trains.

A proof's step is a run of ``llm.pretrain`` with the configuration that
:func:`nemo_megacpp.nemo.pretrain_task.to_pretrain` makes of a recipe: NeMo's trainer and Megatron
strategy, the precision plugin, Megatron's data-parallel wrapper and optimizer, the data sampler and
its microbatches, our data step, forward step and loss reduction. ``docs/verify.md`` lists what
differs from a user's run, each with its reason.
"""

import nemo_megacpp.nemo.quiet_import  # noqa: F401  # isort: skip  (before NeMo is imported below)

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiddle
import lightning.pytorch as pl
import nemo_run as run
import torch
from megatron.core.models.backends import BackendSpecProvider
from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule
from nemo.lightning.io import IOMixin

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.nemo.gather_probe import GatherProbe
from nemo_megacpp.nemo.hybrid_gpt import HybridModelConfig
from nemo_megacpp.nemo.pretrain_task import to_pretrain
from nemo_megacpp.nemo.proof_gauge import WARM_UP, Gauge
from nemo_megacpp.nemo.proof_probe import Done, Probe
from nemo_megacpp.nemo.quiet_import import quiet_libraries
from nemo_megacpp.proof.case_kernels import kernels_here, use_kernels
from nemo_megacpp.proof.case_runner import TrainingPath
from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.gather_recorder import RecordedGather
from nemo_megacpp.proof.step_data import Rows, linear_form_step
from nemo_megacpp.proof.step_result import ADAM_EPS, Carried, StepResult
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.training import Training
from nemo_megacpp.runtime.launch import rank_environment

_NEVER = 10**9


@dataclass
class ProofModelConfig(HybridModelConfig):
    """The model's configuration of a run, also in float64, in the kernels of the case.

    Megatron keeps a few parameters of its Mamba mixer in float32; in a float64 model they become
    float64, so that their gradients are accumulated and reduced exactly as well.
    """

    def configure_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        module = super().configure_model(*args, **kwargs)
        if self.params_dtype == torch.float64:
            for parameter in module.parameters():
                parameter.data = parameter.data.double()
        return module

    def backend(self) -> BackendSpecProvider | None:
        return use_kernels(self.params_dtype)


class ProofTokenizer(IOMixin):
    """The size of a vocabulary; NeMo builds later virtual stages from what it serialises."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


class ProofData(PreTrainingDataModule):
    """NeMo's pre-training data module, with :class:`nemo_megacpp.proof.step_data.Rows` as dataset.

    The sampler, which splits rows into microbatches and over data-parallel ranks, and the loader
    are a run's own.

    Args:
        spec: of the proof's step.
    """

    def __init__(self, spec: StepSpec):
        super().__init__(
            {split: [os.devnull] for split in ("train", "validation", "test")},  # none is read
            seq_length=spec.model["seq_length"],
            tokenizer=ProofTokenizer(spec.model["vocab_size"]),  # type: ignore[arg-type]
            micro_batch_size=spec.micro_batch_size,
            global_batch_size=spec.global_batch_size,
            num_workers=0,
            pin_memory=False,
            split=None,  # type: ignore[arg-type]
            output_log=False,
        )
        self.create_attention_mask = False
        self._spec = spec

    def build(self, *args: Any, **kwargs: Any) -> None:
        """Make the rows; nothing is read or written."""
        self._train_ds = self._validation_ds = self._test_ds = Rows(self._spec)  # type: ignore[assignment]


def run_step(
    spec: StepSpec,
    layout: ParallelLayout,
    weights: GlobalValues | None = None,
    trace: bool = False,
    perturb_seed: int | None = None,
) -> StepResult | None:
    """Take the steps of ``spec`` in ``layout``, on every rank of it.

    Args:
        spec: what to compute.
        layout: where.
        weights: initial weights, :attr:`StepResult.initial` of one rank's step; None for the run's
            own, disturbed.
        trace: record the tensors inside the model as well.
        perturb_seed: move the activations within bfloat16 rounding, with these random signs.

    Returns:
        On rank 0, what the steps gave.
    """
    probe = Probe(spec, weights, trace=trace, perturb_seed=perturb_seed)
    _pretrain(spec, layout, probe)
    return probe.result


def train_and_save(
    spec: StepSpec,
    layout: ParallelLayout,
    run_dir: str,
    after: int,
    weights: GlobalValues | None = None,
) -> Carried | None:
    """Take the steps of ``spec``, and save a checkpoint as a run does when ``after`` of them are
    done, under ``run_dir`` (:func:`nemo_megacpp.proof.step_result.checkpoint_of`).

    Returns:
        On rank 0, the state that was saved and the steps that followed it.
    """
    probe = Probe(spec, weights, state_at=after)
    _pretrain(spec, layout, probe, run_dir=run_dir, save_interval=max(after, 1))
    return probe.carried


def resume_and_train(
    spec: StepSpec, layout: ParallelLayout, checkpoint: str, after: int
) -> Carried | None:
    """Resume a checkpoint of ``after`` steps in ``layout`` as a run does, and take the remaining
    steps of ``spec``, if any.

    Returns:
        On rank 0, the state that was loaded and the steps that followed it.
    """
    ends = spec.steps <= after
    if ends:  # a run that is complete does nothing
        spec = dataclasses.replace(spec, steps=after + 1)
    probe = Probe(spec, resumed=True, state_at=after, end_there=ends)
    _pretrain(spec, layout, probe, resume=checkpoint)
    return probe.carried


def measure_steps(spec: StepSpec, layout: ParallelLayout, timed: int) -> tuple[int, list[float]]:
    """Take ``timed`` steps of ``spec`` after a warm-up, from random weights.

    Returns:
        On every rank, the most bytes that its tensors held in a step, and the seconds of each step.
    """
    gauge = Gauge()
    _pretrain(dataclasses.replace(spec, steps=WARM_UP + timed), layout, gauge)
    return gauge.peak, gauge.seconds


def record_gathers(spec: StepSpec, layout: ParallelLayout) -> list[RecordedGather]:
    """Take the first step of ``spec`` in ``layout``, on every rank of it.

    Returns:
        This rank's gathers and all-to-alls of the first microbatch.
    """
    probe = GatherProbe(spec)
    _pretrain(spec, layout, probe)
    return probe.gathers


def _pretrain(
    spec: StepSpec,
    layout: ParallelLayout,
    probe: pl.Callback,
    run_dir: str | None = None,
    save_interval: int | None = None,
    resume: str | None = None,
) -> None:
    """Run ``llm.pretrain`` on the ranks, and in the default process group, of this task."""
    world = torch.distributed.get_world_size()
    os.environ.update(rank_environment(torch.distributed.get_rank(), world))
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        config = _configuration(spec, layout, Path(run_dir or scratch), world)
        config.log.locks = config.log.ckpt.prints = False
        config.log.ckpt.every_n_train_steps = save_interval or _NEVER
        config.resume.resume_from_path = resume
        pretrain = fiddle.build(config)
        pretrain.keywords["trainer"].callbacks.append(probe)
        torch.set_num_threads(1)  # Lightning gives a single process all cores
        with contextlib.suppress(Done):
            pretrain()


def _configuration(
    spec: StepSpec, layout: ParallelLayout, run_dir: Path, world: int
) -> run.Partial:
    """Return a run's configuration of ``spec``, with the changes that ``docs/verify.md`` lists."""
    training = Training(
        max_steps=spec.steps,
        micro_batch_size=spec.micro_batch_size,
        global_batch_size=spec.global_batch_size,
        packed_documents=bool(spec.documents),
        lr=spec.learning_rate,
        min_lr=spec.learning_rate / 2,
        warmup_steps=0,
        weight_decay=0.01,
        clip_grad=spec.clip_grad,
        precision="bf16" if spec.dtype == "bfloat16" else "fp32",
        seed=spec.seed,
        use_distributed_optimizer=spec.use_distributed_optimizer,
        tensorboard=False,
    )
    model = kernels_here(spec.dtype).fields(spec.model)
    recipe = Recipe("proof", model, layout, training)
    config = to_pretrain(recipe, run_dir, devices=world)
    settled = config.model.config
    fields = {name: getattr(settled, name) for name in settled.__arguments__}
    config.model.config = run.Config(ProofModelConfig, **fields)
    config.data = run.Config(ProofData, spec=spec)
    config.trainer.limit_val_batches, config.trainer.val_check_interval = 0, 1
    config.trainer.callbacks, config.trainer.logger = [], False
    config.optim.config.adam_eps = ADAM_EPS
    if spec.objective == "logits":
        config.model.config.forward_step_fn = linear_form_step
    _update(config.trainer.strategy.ddp, spec.ddp)
    _update(config.optim.config, spec.optimizer)
    if spec.dtype == "float64":
        _in_float64(config)
    return config


def _in_float64(config: run.Partial) -> None:
    config.model.config.params_dtype = torch.float64
    config.model.config.pipeline_dtype = torch.float64
    config.model.config.moe_router_dtype = "fp64"
    config.trainer.strategy.pipeline_dtype = torch.float64
    config.trainer.strategy.ddp.grad_reduce_in_fp32 = False
    config.optim.config.params_dtype = torch.float64
    for part in (config.trainer.strategy.ddp, config.optim.config):
        part.use_distributed_optimizer = part.overlap_param_gather = False


def _update(config: run.Config, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        setattr(config, name, value)


NEMO = TrainingPath(run_step, train_and_save, resume_and_train)
"""The path of ``nemo-megacpp train`` and of the NeMo factories."""
