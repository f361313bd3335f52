"""A Lightning callback that reads a proof's numbers off a run while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from megatron.core.num_microbatches_calculator import get_num_microbatches

from nemo_megacpp.proof.gather import GlobalValues
from nemo_megacpp.proof.step_reader import StepReader
from nemo_megacpp.proof.step_result import Carried, StepResult
from nemo_megacpp.proof.step_spec import StepSpec


class Done(Exception):
    """The proof has read what it needs; NeMo's trainer cannot be stopped earlier."""


class Probe(pl.Callback):
    """Drives a :class:`nemo_megacpp.proof.step_reader.StepReader` from NeMo's trainer.

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
        self._reader = StepReader(spec, weights, resumed, trace, perturb_seed)
        self._resumed = resumed
        self._state_at, self._end_there = state_at, end_there

    @property
    def result(self) -> StepResult | None:
        """On rank 0, what the steps gave."""
        return self._reader.result

    @property
    def carried(self) -> Carried | None:
        """On rank 0, the training state that was gathered."""
        return self._reader.carried

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the model its weights, and start to watch it."""
        strategy: Any = trainer.strategy
        wrapped = [chunk.module for chunk in strategy.megatron_parallel]
        optimizer = strategy.optimizers[0].mcore_optimizer
        self._reader.begin(wrapped, pl_module.config, optimizer)
        if trainer.global_step == self._state_at:
            self._gather_state(trainer)

    def on_megatron_reduce_microbatches_end(
        self, loss_reduction: Any, microbatch_outputs: Any, **kwargs: Any
    ) -> None:
        """Append the loss in full precision; NeMo logs it in float32."""
        self._reader.add_loss(float(loss_reduction.mean(microbatch_outputs)))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Gather the gradients of the first step and of the last."""
        self._reader.before_step(trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Append the auxiliary losses and the gradient norm."""
        norm = trainer.callback_metrics.get("grad_norm")
        norm = float("nan") if norm is None else float(norm)
        self._reader.after_step(trainer.global_step, get_num_microbatches(), norm)
        if trainer.global_step == self._state_at:
            self._gather_state(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last step, gather the parameters, the losses and the trace to rank 0."""
        self._reader.finish()
        raise Done  # before the run saves its last state

    def _gather_state(self, trainer: pl.Trainer) -> None:
        strategy: Any = trainer.strategy
        if strategy.ddp_config.overlap_param_gather:
            strategy.megatron_parallel.force_param_sync()  # as NeMo does before it saves
        self._reader.gather_state()
        if trainer.global_step == 0 and not self._resumed:
            save: Any = trainer.checkpoint_callback  # a run saves after steps only
            save._save_checkpoint(trainer, str(Path(str(save.dirpath)) / "step=0"))
        if self._end_there:
            raise Done
