"""What a run records and prints: its steps, its starts and ends, and the summary."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import os
import time
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import unwrap_model
from nemo.lightning.io import IOMixin

from nemo_megacpp.checkpoint.described import actual_layout
from nemo_megacpp.checkpoint.folder import newest_checkpoint, read_identity
from nemo_megacpp.mixers.aux_loss import reduced_aux_losses
from nemo_megacpp.nemo.stops import StopOnSigterm
from nemo_megacpp.preflight.outputs import job_process
from nemo_megacpp.printable import say
from nemo_megacpp.runs.events import append_record, record_event
from nemo_megacpp.runs.ranks import memory_now, over_ranks
from nemo_megacpp.runs.run_folder import METRICS_FILE
from nemo_megacpp.runs.summary import show_step, summarize, write_summary
from nemo_megacpp.runs.throughput import Throughput
from nemo_megacpp.runtime.launch import launched


class RunFolderWandbLogger(WandbLogger):
    """``WandbLogger`` with an absolute folder.

    NeMo's logger prefixes the run folder more than once, which changes no absolute path.

    Args:
        save_dir: the run folder; W&B makes ``wandb/`` in it.
        kwargs: of ``WandbLogger``.
    """

    def __init__(self, save_dir: str, **kwargs: Any):
        super().__init__(save_dir=os.path.abspath(save_dir), **kwargs)


def _number(value: Any) -> Optional[float]:  # noqa: UP045
    return None if value is None else float(value)


class RunRecorder(pl.Callback, IOMixin):
    """Record a run's steps and events in its folder, log scalars, print progress and a summary.

    Only global rank 0 writes and prints.

    Args:
        run_dir: the run's folder.
        log_interval: steps between progress lines.
        resumed: the checkpoint that the run resumes.
    """

    def __init__(
        self,
        run_dir: str,
        log_interval: int = 10,
        resumed: Optional[str] = None,  # noqa: UP045
    ):
        self.run_dir = Path(run_dir)
        self.log_interval = log_interval
        self.resumed = resumed
        # Not later: NeMo may set a launcher's variables. Plain data, as NeMo copies callbacks.
        job = job_process(bool(launched()))
        self._job_pid, self._job_began = job.pid, job.create_time()
        self._step_began = 0.0
        self._before = 0
        self._begun = False
        self._heldout: Optional[float] = None  # noqa: UP045
        self._throughput: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._before = memory_now()  # the strategy builds the model after this

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data, strategy = trainer.datamodule, trainer.strategy  # type: ignore[attr-defined]
        chunks = unwrap_model([chunk.module for chunk in strategy.megatron_parallel])
        tokens = data.global_batch_size * data.seq_length
        self._throughput = Throughput(chunks, pl_module.config, tokens)
        if trainer.is_global_zero:
            ranks = trainer.world_size
            details = {
                "pattern": str(pl_module.config.pattern),
                "layout": actual_layout(pl_module.config, ranks).describe(),
                "ranks": ranks,
                "max_steps": trainer.max_steps,
                "startup_seconds": round(time.time() - self._job_began),
            }
            if self.resumed is not None:
                details["checkpoint"] = self.resumed
            kind = "started" if self.resumed is None else "resumed"
            record_event(self.run_dir, kind, trainer.global_step, **details)
        self._step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        aux = reduced_aux_losses(pl_module.config, scale=1.0 / get_num_microbatches())
        now = time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        speed = self._throughput.of(seconds)
        for name, value in {**aux, **speed}.items():
            pl_module.log(name, torch.tensor(value), batch_size=1, rank_zero_only=True)
        step = trainer.global_step
        shown = step % self.log_interval == 0 or step in (1, trainer.max_steps)
        # The first step of a session is measured on all ranks, whether or not it is shown.
        everywhere = over_ranks(self._before, seconds) if shown or not self._begun else {}
        self._begun = True
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        record = {
            "step": step,
            "loss": _number(metrics.get("reduced_train_loss")),
            "grad_norm": _number(metrics.get("grad_norm")),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": seconds,
            **speed,
            "aux": aux,
            **everywhere,
        }
        append_record(self.run_dir / METRICS_FILE, record)
        if shown:
            unit = self._throughput.unit
            print(show_step(record, trainer.max_steps, self._heldout, unit), flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step_began = time.perf_counter()
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(stop, StopOnSigterm) and stop.stopping for stop in callbacks):
            return  # the evaluation was cut short: its loss is that of a part of the data
        loss = _number(trainer.callback_metrics.get("val_loss"))
        if trainer.is_global_zero and loss is not None:
            self._heldout = loss
            append_record(
                self.run_dir / METRICS_FILE, {"step": trainer.global_step, "heldout_loss": loss}
            )
            print(f"step {trainer.global_step:>5}  held-out loss {loss:.4f}", flush=True)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if not trainer.is_global_zero:
            return
        text = str(exception).strip() or type(exception).__name__
        record_event(self.run_dir, "failed", trainer.global_step, reason=text.splitlines()[0])
        if isinstance(exception, KeyboardInterrupt):
            print(self._interrupted(trainer.global_step), flush=True)

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

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the end, and print the summary."""
        if not trainer.is_global_zero:
            return
        kind = "finished" if trainer.global_step >= trainer.max_steps else "stopped"
        record_event(self.run_dir, kind, trainer.global_step)
        summary = summarize(self.run_dir)
        if summary is None:
            return
        write_summary(summary, self.run_dir)
        rows = [(kind, str(self.run_dir)), *summary.rows()]
        width = max(len(name) for name, _ in rows)
        say("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
