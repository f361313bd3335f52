"""A Lightning callback that reads a proof's numbers off a run while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import unwrap_model

from nemo_megacpp.checkpoint.optimizer_state import training_sharded_state_dict
from nemo_megacpp.mixers.aux_loss import reduced_aux_losses
from nemo_megacpp.proof.gather import (
    GlobalValues,
    gather_sharded,
    gather_values,
    shard_values,
)
from nemo_megacpp.proof.main_parameters import gather_parameters
from nemo_megacpp.proof.step_result import (
    Carried,
    StepResult,
    disturb,
    gather_gradients,
)
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.proof.tag_check import TagViolation, tag_violations
from nemo_megacpp.proof.taps import Recorder, perturb


class Done(Exception):
    """The proof has read what it needs; NeMo's trainer cannot be stopped earlier."""


class Probe(pl.Callback):
    """Gives a run its initial weights, and reads losses, gradients and parameters off it.

    Args:
        spec: what the run computes.
        weights: initial weights, of one rank's :attr:`StepResult.initial`; None for the run's own,
            disturbed.
        resumed: the run resumes a checkpoint, whose weights stay as they are.
        trace: record the tensors inside the model (a single step).
        perturb_seed: move activations within bfloat16 rounding.
        state_at: gather the whole training state when this many steps are done.
        end_there: end the run then.
    """

    def __init__(
        self,
        spec: StepSpec,
        weights: GlobalValues | None = None,
        resumed: bool = False,
        trace: bool = False,
        perturb_seed: int | None = None,
        state_at: int | None = None,
        end_there: bool = False,
    ):
        self._spec = spec
        self._weights, self._resumed = weights, resumed
        self._traced, self._perturb_seed = trace, perturb_seed
        self._state_at, self._end_there = state_at, end_there
        self._initial: GlobalValues | None = GlobalValues()
        self._chunks: list[torch.nn.Module] = []
        self._wrapped: list[Any] = []
        self._recorder: Recorder | None = None
        self._first = True
        self._violations: Sequence[TagViolation] = ()
        self._losses: list[float] = []
        self._grad_norms: list[float] = []
        self._aux_losses: dict[str, float] = {}
        self._gradients = GlobalValues()
        self.result: StepResult | None = None
        self.carried: Carried | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the model its weights, and start to watch it."""
        parallel: Any = trainer.strategy.megatron_parallel  # type: ignore[attr-defined]
        self._wrapped = [chunk.module for chunk in parallel]
        self._chunks = list(unwrap_model(self._wrapped))
        self._violations = tag_violations(self._chunks)
        if not self._resumed:
            if self._weights is None:
                disturb(self._spec, self._chunks)
                self._initial = gather_values(self._chunks)
            else:
                shard_values(self._chunks, self._weights)
            self._optimizer(trainer).reload_model_params()
        config: Any = pl_module.config
        if self._perturb_seed is not None:
            perturb(self._chunks, config, self._perturb_seed)
        if self._traced:
            self._recorder = Recorder(self._chunks, config, self._spec)
        if trainer.global_step == self._state_at:
            self._gather_state(trainer)

    def on_megatron_reduce_microbatches_end(
        self, loss_reduction: Any, microbatch_outputs: Any, **kwargs: Any
    ) -> None:
        """Append the loss in full precision; NeMo logs it in float32."""
        self._losses.append(float(loss_reduction.mean(microbatch_outputs)))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Gather the gradients of the first step and of the last."""
        step = trainer.global_step + 1
        if not (self._first or step == self._spec.steps):
            return
        gathered = gather_gradients(self._chunks, self._wrapped)
        if gathered is not None:
            self._gradients.add(gathered, "" if self._first else f"@{step}")
        self._first = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Append the auxiliary losses and the gradient norm."""
        suffix = "" if self._spec.steps == 1 else f"@{trainer.global_step}"
        config: Any = pl_module.config
        losses = reduced_aux_losses(config, scale=1.0 / get_num_microbatches())
        self._aux_losses.update({f"{name}{suffix}": value for name, value in losses.items()})
        norm = trainer.callback_metrics.get("grad_norm")
        self._grad_norms.append(float("nan") if norm is None else float(norm))
        if trainer.global_step == self._state_at:
            self._gather_state(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last step, gather the parameters, the losses and the trace to rank 0."""
        for chunk in self._wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        parameters = gather_parameters(self._chunks, self._wrapped)
        trace = None if self._recorder is None else self._recorder.gather()
        losses = _from_last_stage(self._losses)
        if parameters is not None:
            assert self._initial is not None
            self.result = StepResult(
                losses,
                self._grad_norms,
                self._aux_losses,
                self._gradients,
                parameters,
                trace,
                self._initial,
                self._violations,
            )
            if self.carried is not None:
                self.carried.following = self.result
        raise Done  # before the run saves its last state

    def _gather_state(self, trainer: pl.Trainer) -> None:
        state = training_sharded_state_dict(self._chunks, self._optimizer(trainer))
        optimizer = state["optimizer"]
        values = gather_sharded(state)
        if values is not None:
            self.carried = Carried(values, optimizer["step"], optimizer["param_groups"])
        if trainer.global_step == 0 and not self._resumed:
            save: Any = trainer.checkpoint_callback  # a run saves after steps only
            save._save_checkpoint(trainer, str(Path(str(save.dirpath)) / "step=0"))
        if self._end_there:
            raise Done

    def _optimizer(self, trainer: pl.Trainer) -> Any:
        return trainer.strategy.optimizers[0].mcore_optimizer  # type: ignore[attr-defined]


def _from_last_stage(losses: list[float]) -> list[float]:
    """Return the losses, which ranks of the last pipeline stage know, on rank 0."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, losses)
    return next(known for known in everyone if known)
