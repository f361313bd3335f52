"""What a run through Bridge records, prints, and ends for."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.state import GlobalState
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from nemo_megacpp.bridge.forward_step import LOSS
from nemo_megacpp.bridge.terminal import tell
from nemo_megacpp.runs.events import record_event
from nemo_megacpp.runs.non_finite import non_finite
from nemo_megacpp.runs.session import Session
from nemo_megacpp.runtime import heartbeat, stopping
from nemo_megacpp.runtime.launch import launched


def of_last_stage(loss: Any) -> float:
    """Return the loss, which only the last pipeline stage has, on every rank of the pipeline."""
    here = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    if loss is not None:
        here = here + torch.as_tensor(loss, dtype=torch.float64, device=here.device).reshape(())
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        torch.distributed.all_reduce(here, group=group)
    return float(here)


class RunRecorder(Callback):
    """Record a run's steps and events in its folder, log scalars, print progress and a summary.

    Args:
        run_dir: the run's folder.
        log_interval: steps between progress lines.
        resumed: the checkpoint that the run resumes.
        sigterm: of the same run.
    """

    def __init__(
        self, run_dir: Path, log_interval: int, resumed: str | None, sigterm: StopOnSigterm
    ):
        self._sigterm = sigterm
        self.session = Session(run_dir, log_interval, resumed)
        self.session.before_model()  # Bridge builds the model after this
        self.begun = False
        self.step = 0
        self._evaluated: int | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        """Record the start."""
        cfg = context.state.cfg
        self.step = context.state.train_state.step
        operations = self.session.start(
            unwrap_model(context.model),
            cfg.model,
            cfg.train.global_batch_size * cfg.model.seq_length,
            step=self.step,
            max_steps=cfg.train.train_iters,
            through="bridge",
        )
        cfg.model.row_operations = operations / cfg.train.global_batch_size
        self.begun = True

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Record and print a step; Bridge counts it after this.

        Raises:
            UserError: loss or gradient norm is NaN or Inf; nothing of this step is saved.
        """
        cfg = context.state.cfg
        step = context.state.train_state.step + 1
        loss = of_last_stage((context.loss_dict or {}).get(LOSS))
        norm = float("nan") if context.grad_norm is None else float(context.grad_norm)
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise non_finite(step, f"the {name} is {value}")
        self.step = step
        assert context.optimizer is not None
        lr = context.optimizer.param_groups[0]["lr"]
        line, scalars = self.session.end_step(step, cfg.model, lr, loss=loss, grad_norm=norm)
        self._log({LOSS: loss, "grad-norm": norm, "learning-rate": lr, **scalars}, context, step)
        if line is not None:
            tell(line)

    def on_eval_end(self, context: CallbackContext) -> None:
        """Record an evaluation."""
        self.session.restart_clock()
        if self._sigterm.stopping:
            return  # the evaluation was cut short: its loss is that of a part of the data
        self._evaluated = self.step
        loss = of_last_stage((context.total_loss_dict or {}).get(LOSS))
        self._log({f"{LOSS} validation": loss}, context, self.step)
        if torch.distributed.get_rank() == 0:
            tell(self.session.end_evaluation(self.step, loss))

    def on_train_end(self, context: CallbackContext) -> None:
        """Leave out the evaluation with which Bridge ends a run where its last step has had one."""
        if self._evaluated == self.step:
            context.state.train_state.do_valid = False

    def _log(self, scalars: dict[str, float], context: CallbackContext, step: int) -> None:
        """Give scalars to the loggers, which Bridge has on its last rank."""
        if (writer := context.state.tensorboard_logger) is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
        if (wandb := context.state.wandb_logger) is not None:
            wandb.log(scalars, step)

    def fail(self, error: BaseException) -> None:
        """Record what ended the run."""
        if _is_global_zero() and (said := self.session.fail(self.step, error)) is not None:
            tell(said)

    def finish(self, max_steps: int) -> None:
        """Record the end of the run, and print the summary; Bridge has left the job by now."""
        if _is_global_zero() and (said := self.session.end(self.step, max_steps)) is not None:
            tell(said)


def _is_global_zero() -> bool:
    return (place := launched()) is None or place.rank == 0


class StopOnSigterm(Callback):
    """Save and stop after the step in which SIGTERM has reached any rank.

    An evaluation is cut short, as it may take longer than the time that a scheduler leaves.

    Args:
        run_dir: the run's folder, which records it.
    """

    def __init__(self, run_dir: Path):
        self.run_dir, self.stopping = run_dir, False

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Ask all ranks after a step; Bridge counts it after this."""
        self._ask(context.state, context.state.train_state.step + 1)

    def on_eval_step_end(self, context: CallbackContext) -> None:
        """Ask all ranks after a batch of an evaluation."""
        self._ask(context.state, context.state.train_state.step)
        if self.stopping:
            context.state.cfg.validation.eval_iters = 0  # which Bridge's loop compares with

    def _ask(self, state: GlobalState, step: int) -> None:
        asked = torch.tensor(int(stopping.stop_asked()), device=torch.cuda.current_device())
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if not asked.item():
            return
        state.cfg.train.exit_interval = step  # Bridge saves and stops at a multiple of it
        state.train_state.do_valid = False
        self.stopping = True
        if torch.distributed.get_rank() == 0:
            tell(f"step {step:>5}  SIGTERM: saving, then stopping")
            record_event(self.run_dir, "sigterm", step)

    def finish(self) -> None:
        """Say how to go on."""
        if self.stopping and _is_global_zero():
            tell("stopped by SIGTERM; resume it with resume=auto")


class Heartbeats(Callback):
    """Tell :mod:`nemo_megacpp.runtime.heartbeat` where the loop of the run stands.

    Args:
        timeout_minutes, init_timeout_minutes: of the recipe.
    """

    def __init__(self, timeout_minutes: float, init_timeout_minutes: float):
        self._longer = timedelta(minutes=2 * (timeout_minutes + init_timeout_minutes))
        self._trained = self._evaluated = False

    def on_train_start(self, context: CallbackContext) -> None:
        """Set the timeouts of the process groups, which name no rank, beyond ours."""
        parallel_state.update_pg_timeout(self._longer)

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Begin a step."""
        done = context.state.train_state.step
        heartbeat.progress(f"step {done + 1}", slow=not self._trained, steps=done)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """End a step."""
        self._trained = True
        heartbeat.progress(slow=False, steps=context.state.train_state.step + 1)

    def on_eval_start(self, context: CallbackContext) -> None:
        """Begin an evaluation."""
        phase = f"the evaluation after step {context.state.train_state.step}"
        heartbeat.progress(phase, slow=not self._evaluated)

    def on_eval_step_end(self, context: CallbackContext) -> None:
        """End a batch of an evaluation."""
        self._evaluated = True
        heartbeat.progress(slow=False)

    def on_train_end(self, context: CallbackContext) -> None:
        """End the loop."""
        heartbeat.progress("the end of the run", slow=True)
