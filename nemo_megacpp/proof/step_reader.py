"""Reads a proof's numbers off the modules and the optimizer that train, whoever drives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from nemo_megacpp.checkpoint.optimizer_state import training_sharded_state_dict
from nemo_megacpp.mixers.aux_loss import reduced_aux_losses
from nemo_megacpp.proof import fsdp
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
from nemo_megacpp.specs.depth_losses import reduced_depth_losses


class StepReader:
    """Gives a run its initial weights, and reads losses, gradients and parameters off it.

    The driver of the run calls :meth:`give_weights` where the model's wrapper shards its weights,
    :meth:`begin`, then for each step :meth:`add_loss`,
    :meth:`before_step` and :meth:`after_step`, and :meth:`finish`; every rank calls all of them.

    Args:
        spec: what the run computes.
        weights: initial weights, of one rank's :attr:`StepResult.initial`; None for the run's own,
            disturbed.
        resumed: the run resumes a checkpoint, whose weights stay as they are.
        trace: record the tensors inside the model (a single step).
        perturb_seed: move activations within bfloat16 rounding.

    Attributes:
        result: after :meth:`finish`, on rank 0, what the steps gave.
        carried: after :meth:`gather_state`, on rank 0, the training state of that moment.
        chunks: this rank's model chunks, unwrapped.
    """

    def __init__(
        self,
        spec: StepSpec,
        weights: GlobalValues | None = None,
        resumed: bool = False,
        trace: bool = False,
        perturb_seed: int | None = None,
    ):
        self._spec = spec
        self._weights, self._resumed = weights, resumed
        self._traced, self._perturb_seed = trace, perturb_seed
        self._initial: GlobalValues | None = GlobalValues()
        self._wrapped: Sequence[Any] = ()
        self._config: Any = None
        self._optimizer: Any = None
        self._recorder: Recorder | None = None
        self._first = True
        self._violations: Sequence[TagViolation] | None = None
        self._losses: list[float] = []
        self._grad_norms: list[float] = []
        self._aux_losses: dict[str, float] = {}
        self._gradients = GlobalValues()
        self.chunks: list[torch.nn.Module] = []
        self.result: StepResult | None = None
        self.carried: Carried | None = None

    def give_weights(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Give the model its weights, and check its tags.

        Args:
            chunks: its chunks, unwrapped.
        """
        self.chunks = list(chunks)
        self._violations = tag_violations(self.chunks)
        if self._resumed:
            return
        if self._weights is None:
            disturb(self._spec, chunks)
            self._initial = gather_values(chunks)
        else:
            shard_values(chunks, self._weights)

    def begin(self, wrapped: Sequence[Any], config: Any, optimizer: Any) -> None:
        """Give the model its weights, unless it has them, and start to watch it.

        Args:
            wrapped: its chunks, each in Megatron's data-parallel wrapper.
            config: of the model.
            optimizer: Megatron's.
        """
        self._wrapped, self._config, self._optimizer = wrapped, config, optimizer
        if self._violations is None:
            self.give_weights(unwrap_model(list(wrapped)))
            if not self._resumed:
                optimizer.reload_model_params()
        if self._perturb_seed is not None:
            perturb(self.chunks, config, self._perturb_seed)
        if self._traced:
            self._recorder = Recorder(self.chunks, config, self._spec)

    @property
    def _is_fsdp(self) -> bool:
        return bool(self._wrapped[0].ddp_config.use_megatron_fsdp)

    def add_loss(self, loss: float) -> None:
        """Append the loss of a step, in full precision."""
        self._losses.append(loss)

    def before_step(self, step: int) -> None:
        """Gather the gradients of the first step and of the last; ``step`` counts from 1."""
        if not (self._first or step == self._spec.steps):
            return
        if self._is_fsdp:
            gathered = fsdp.gather_gradients(self._wrapped)
        else:
            gathered = gather_gradients(self.chunks, self._wrapped)
        if gathered is not None:
            self._gradients.add(gathered, "" if self._first else f"@{step}")
        self._first = False

    def after_step(self, step: int, microbatches: int, grad_norm: float) -> None:
        """Append the auxiliary losses and the gradient norm of a step."""
        suffix = "" if self._spec.steps == 1 else f"@{step}"
        scale = 1.0 / microbatches
        losses = reduced_aux_losses(self._config, scale)
        losses |= reduced_depth_losses(self.chunks, self._config, scale)
        self._aux_losses.update({f"{name}{suffix}": value for name, value in losses.items()})
        self._grad_norms.append(grad_norm)

    def gather_state(self) -> None:
        """Gather the whole training state to rank 0."""
        state = training_sharded_state_dict(self.chunks, self._optimizer)
        optimizer = state["optimizer"]
        values = gather_sharded(state)
        if values is not None:
            self.carried = Carried(values, optimizer["step"], optimizer["param_groups"])

    def finish(self) -> None:
        """After the last step, gather the parameters, the losses and the trace to rank 0."""
        if self._is_fsdp:
            parameters = fsdp.gather_parameters(self._wrapped)
        else:
            for chunk in self._wrapped:
                if chunk.ddp_config.overlap_param_gather:
                    chunk.start_param_sync(force_sync=True)
            parameters = gather_parameters(self.chunks, self._wrapped)
        trace = None if self._recorder is None else self._recorder.gather()
        losses = _from_last_stage(self._losses)
        if parameters is None:
            return
        assert self._initial is not None
        self.result = StepResult(
            losses,
            self._grad_norms,
            self._aux_losses,
            self._gradients,
            parameters,
            trace,
            self._initial,
            self._violations or (),
        )
        if self.carried is not None:
            self.carried.following = self.result


def _from_last_stage(losses: list[float]) -> list[float]:
    """Return the losses, which ranks of the last pipeline stage know, on rank 0."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, losses)
    return next(known for known in everyone if known)
