"""A session of a run, from its start or resumption to its end: what every door records and prints.

The doors' callbacks say what happened; global rank 0 alone writes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches

from nemo_megacpp.checkpoint.described import actual_layout
from nemo_megacpp.checkpoint.folder import newest_checkpoint, read_identity
from nemo_megacpp.mixers.aux_loss import reduced_aux_losses
from nemo_megacpp.preflight.outputs import job_process
from nemo_megacpp.runs.events import append_record, record_event
from nemo_megacpp.runs.ranks import memory_now, over_ranks
from nemo_megacpp.runs.run_folder import METRICS_FILE
from nemo_megacpp.runs.summary import show_step, summarize, write_summary
from nemo_megacpp.runs.throughput import Throughput
from nemo_megacpp.runtime.launch import launched
from nemo_megacpp.specs.depth_losses import reduced_depth_losses


class Session:
    """What a run's steps and events become in its folder and on the terminal.

    Args:
        run_dir: the run's folder.
        log_interval: steps between progress lines.
        resumed: the checkpoint that the run resumes.
    """

    def __init__(self, run_dir: Path, log_interval: int, resumed: str | None):
        self.run_dir, self.log_interval, self.resumed = run_dir, log_interval, resumed
        # Not later: a library may set a launcher's variables. Plain data, as NeMo copies callbacks.
        job = job_process(bool(launched()))
        self._job_pid, self._job_began = job.pid, job.create_time()
        self._max_steps = 0
        self._step_began = 0.0
        self._before = 0
        self._begun = False
        self._heldout: float | None = None
        self._throughput: Any = None
        self._chunks: Sequence[torch.nn.Module] = ()

    def before_model(self) -> None:
        """Note the memory that is in use before the model is built."""
        self._before = memory_now()

    def start(
        self,
        chunks: Sequence[torch.nn.Module],
        config: Any,
        tokens: int,
        *,
        step: int,
        max_steps: int,
        **details: Any,
    ) -> float:
        """Record the start; a collective over all ranks.

        Args:
            chunks: of the model on this rank, unwrapped.
            config: of the model.
            tokens: of a step, in the whole job.
            step: steps that are complete.
            max_steps: of the run.
            details: of the event, beside what every door says.

        Returns:
            The model FLOPs of a step.
        """
        self._max_steps, self._chunks = max_steps, chunks
        self._throughput = Throughput(chunks, config, tokens)
        ranks = torch.distributed.get_world_size()
        if torch.distributed.get_rank() == 0:
            said = {
                "pattern": str(config.pattern),
                "layout": actual_layout(config, ranks).describe(),
                "ranks": ranks,
                "max_steps": max_steps,
                "startup_seconds": round(time.time() - self._job_began),
                **details,
            }
            if self.resumed is not None:
                said["checkpoint"] = self.resumed
            kind = "started" if self.resumed is None else "resumed"
            record_event(self.run_dir, kind, step, **said)
        self.restart_clock()
        return self._throughput.tflop_per_rank * ranks * 1e12

    def restart_clock(self) -> None:
        """Let the seconds of the next step begin now."""
        self._step_began = time.perf_counter()

    def end_step(self, step: int, config: Any, lr: float, **values: Any) -> tuple[str | None, Any]:
        """Record a step; a collective over all ranks.

        Args:
            step: steps that are complete.
            config: of the model, for its auxiliary losses and those of its prediction depths.
            lr: learning rate of the step.
            values: ``loss`` and ``grad_norm``, either may be None.

        Returns:
            On global rank 0 the line to print, if it is this step's turn; and the scalars for the
            loggers by name: auxiliary losses (those of prediction depths among them), and speed.
        """
        scale = 1.0 / get_num_microbatches()
        aux = reduced_aux_losses(config, scale)
        aux |= reduced_depth_losses(self._chunks, config, scale)
        now = time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        speed = self._throughput.of(seconds)
        shown = step % self.log_interval == 0 or step in (1, self._max_steps)
        # The first step of a session is measured on all ranks, whether or not it is shown.
        everywhere = over_ranks(self._before, seconds) if shown or not self._begun else {}
        self._begun = True
        scalars = {**aux, **speed}
        if torch.distributed.get_rank() != 0:
            return None, scalars
        record = {
            "step": step,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "lr": lr,
            "seconds": seconds,
            **speed,
            "aux": aux,
            **everywhere,
        }
        append_record(self.run_dir / METRICS_FILE, record)
        unit = self._throughput.unit
        line = show_step(record, self._max_steps, self._heldout, unit) if shown else None
        return line, scalars

    def end_evaluation(self, step: int, loss: float) -> str:
        """Record an evaluation, on global rank 0, and return the line to print."""
        self._heldout = loss
        append_record(self.run_dir / METRICS_FILE, {"step": step, "heldout_loss": loss})
        return f"step {step:>5}  held-out loss {loss:.4f}"

    def fail(self, step: int, error: BaseException) -> str | None:
        """Record on global rank 0 what ended the run, and return what to say of an interrupt."""
        text = str(error).strip() or type(error).__name__
        record_event(self.run_dir, "failed", step, reason=text.splitlines()[0])
        return self._interrupted(step) if isinstance(error, KeyboardInterrupt) else None

    def _interrupted(self, step: int) -> str:
        """Return what Ctrl-C has lost, how to resume, and how to stop without a loss."""
        newest = newest_checkpoint(self.run_dir / "checkpoints")
        checkpoint = newest or (Path(self.resumed) if self.resumed else None)
        if checkpoint is None:
            lost, resume = "No checkpoint was saved, so all steps are lost.", ""
        else:
            identity = read_identity(checkpoint)
            saved = identity["step"] if identity else 0
            lost = f"Steps lost since the checkpoint of step {saved}: {step - saved}."
            how = f"resume=auto run_dir={self.run_dir}" if newest else f"resume={checkpoint}"
            resume = f" To resume, repeat the command with {how}."
        return (
            f"Interrupted at step {step}. {lost}{resume} To stop a run with a checkpoint, send "
            f"SIGTERM (here: kill {self._job_pid}) instead of Ctrl-C."
        )

    def end(self, step: int, max_steps: int) -> str | None:
        """Record the end on global rank 0, and return the summary to print.

        Args:
            step: steps that are complete.
            max_steps: of the run.
        """
        kind = "finished" if step >= max_steps else "stopped"
        record_event(self.run_dir, kind, step)
        summary = summarize(self.run_dir)
        if summary is None:
            return None
        write_summary(summary, self.run_dir)
        rows = [(kind, str(self.run_dir)), *summary.rows()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
