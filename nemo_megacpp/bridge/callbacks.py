"""What a run through Bridge records, prints, and ends for."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import unwrap_model

from nemo_megacpp.bridge.forward_step import LOSS
from nemo_megacpp.bridge.terminal import tell
from nemo_megacpp.checkpoint.described import actual_layout
from nemo_megacpp.mixers.aux_loss import reduced_aux_losses
from nemo_megacpp.preflight.outputs import job_process
from nemo_megacpp.runs.events import append_record, record_event
from nemo_megacpp.runs.non_finite import non_finite
from nemo_megacpp.runs.ranks import memory_now, over_ranks
from nemo_megacpp.runs.run_folder import METRICS_FILE
from nemo_megacpp.runs.summary import show_step, summarize, write_summary
from nemo_megacpp.runs.throughput import Throughput
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
    """Record a run's steps and events in its folder, print progress and a summary.

    Only global rank 0 writes and prints.

    Args:
        run_dir: the run's folder.
        log_interval: steps between progress lines.
        resumed: the checkpoint that the run resumes.
    """

    def __init__(self, run_dir: Path, log_interval: int, resumed: str | None):
        self.run_dir, self.log_interval, self.resumed = run_dir, log_interval, resumed
        job = job_process(bool(launched()))
        self._job_pid, self._job_began = job.pid, job.create_time()
        self._before = memory_now()  # Bridge builds the model after this
        self._step_began = 0.0
        self._begun = False
        self._heldout: float | None = None
        self._evaluated: int | None = None
        self._throughput: Any = None
        self.step = 0

    def on_train_start(self, context: CallbackContext) -> None:
        """Record the start."""
        cfg = context.state.cfg
        tokens = cfg.train.global_batch_size * cfg.model.seq_length
        self._throughput = Throughput(unwrap_model(context.model), cfg.model, tokens)
        ranks = torch.distributed.get_world_size()
        operations = self._throughput.tflop_per_rank * ranks * 1e12
        cfg.model.row_operations = operations / cfg.train.global_batch_size
        self.step = context.state.train_state.step
        if torch.distributed.get_rank() == 0:
            details = {
                "pattern": str(cfg.model.pattern),
                "layout": actual_layout(cfg.model, ranks).describe(),
                "ranks": ranks,
                "max_steps": cfg.train.train_iters,
                "startup_seconds": round(time.time() - self._job_began),
                "through": "bridge",
            }
            if self.resumed is not None:
                details["checkpoint"] = self.resumed
            kind = "started" if self.resumed is None else "resumed"
            record_event(self.run_dir, kind, self.step, **details)
        self._step_began = time.perf_counter()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Record and print a step; Bridge counts it after this.

        Raises:
            UserError: loss or gradient norm is NaN or Inf; nothing of this step is saved.
        """
        cfg = context.state.cfg
        self.step = step = context.state.train_state.step + 1
        loss = of_last_stage((context.loss_dict or {}).get(LOSS))
        norm = float("nan") if context.grad_norm is None else float(context.grad_norm)
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise non_finite(step, f"the {name} is {value}")
        aux = reduced_aux_losses(cfg.model, scale=1.0 / get_num_microbatches())
        now = time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        shown = step % self.log_interval == 0 or step in (1, cfg.train.train_iters)
        everywhere = over_ranks(self._before, seconds) if shown or not self._begun else {}
        self._begun = True
        scalars = {LOSS: loss, "grad-norm": norm, **aux}
        if (writer := context.state.tensorboard_logger) is not None:  # on Bridge's last rank
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
        if (wandb := context.state.wandb_logger) is not None:
            wandb.log(scalars, step)
        if torch.distributed.get_rank() != 0:
            return
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "lr": context.optimizer.param_groups[0]["lr"] if context.optimizer else None,
            "seconds": seconds,
            **self._throughput.of(seconds),
            "aux": aux,
            **everywhere,
        }
        append_record(self.run_dir / METRICS_FILE, record)
        if shown:
            unit = self._throughput.unit
            tell(show_step(record, cfg.train.train_iters, self._heldout, unit))

    def on_eval_end(self, context: CallbackContext) -> None:
        """Record an evaluation."""
        self._step_began = time.perf_counter()
        found = (context.total_loss_dict or {}).get(LOSS)
        loss = of_last_stage(found)
        if torch.distributed.get_rank() != 0 or self._known(self.step):
            return
        self._heldout = loss
        append_record(self.run_dir / METRICS_FILE, {"step": self.step, "heldout_loss": loss})
        tell(f"step {self.step:>5}  held-out loss {loss:.4f}")

    def _known(self, step: int) -> bool:
        """Whether the evaluation after this step is recorded; Bridge evaluates again at its end."""
        known, self._evaluated = self._evaluated == step, step
        return known

    def finish(self, max_steps: int) -> None:
        """Record the end of the run, and print the summary; Bridge has left the job by now."""
        if (place := launched()) is not None and place.rank != 0:
            return
        kind = "finished" if self.step >= max_steps else "stopped"
        record_event(self.run_dir, kind, self.step)
        summary = summarize(self.run_dir)
        if summary is None:
            return
        write_summary(summary, self.run_dir)
        rows = [(kind, str(self.run_dir)), *summary.rows()]
        width = max(len(name) for name, _ in rows)
        tell("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


class StopOnSigterm(Callback):
    """Save and stop after the step in which SIGTERM has reached any rank.

    Args:
        run_dir: the run's folder, which records it.
    """

    def __init__(self, run_dir: Path):
        self.run_dir, self.stopping = run_dir, False

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Ask all ranks; Bridge saves and stops at a multiple of ``exit_interval``."""
        asked = torch.tensor(int(stopping.stop_asked()), device=torch.cuda.current_device())
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if not asked.item():
            return
        state = context.state
        step = state.train_state.step + 1
        state.cfg.train.exit_interval = step
        state.train_state.do_valid = False  # an evaluation may take longer than there is time
        self.stopping = True
        if torch.distributed.get_rank() == 0:
            tell(f"step {step:>5}  SIGTERM: saving, then stopping")
            record_event(self.run_dir, "sigterm", step)

    def finish(self) -> None:
        """Say how to go on."""
        place = launched()
        if self.stopping and (place is None or place.rank == 0):
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
