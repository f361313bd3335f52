"""A trace of chosen steps, by ``torch.profiler``."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from torch.profiler import profile, schedule

from nemo_megacpp.nemo.recorded import Recorded
from nemo_megacpp.printable import say


class StepProfiler(pl.Callback, Recorded):
    """Write a Chrome trace of the steps after ``start`` up to ``end``, on chosen ranks.

    The settings mean what they mean to Megatron's scripts. NeMo's ``PytorchProfilerCallback``
    profiles every rank, writes an execution trace beside each trace, and wants its folder to exist
    before the run is validated.

    Args:
        folder: for the traces, ``rankN.json.gz``.
        start: steps that are complete when the trace begins.
        end: steps that are complete when it ends.
        ranks: global ranks that are profiled.
    """

    def __init__(self, folder: str, start: int, end: int, ranks: list[int]):
        self.folder = Path(folder)
        self.start, self.end = start, end
        self.ranks = ranks
        self._profiler: Optional[profile] = None  # noqa: UP045

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step > self.start:
            print(
                f"no profile: the run resumes at step {trainer.global_step}, past "
                f"profile_step_start={self.start}",
                flush=True,
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The profiler's own start-up takes time: let it fall into the step before the trace.
        warmup = self.start - trainer.global_step
        if trainer.global_rank not in self.ranks or self._profiler or warmup not in (0, 1):
            return
        steps = schedule(wait=0, warmup=warmup, active=self.end - self.start, repeat=1)
        self._profiler = profile(schedule=steps, record_shapes=True, on_trace_ready=self._write)
        self._profiler.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self._profiler is not None:
            self._profiler.step()  # after the last of the steps this writes the trace
            if trainer.global_step >= self.end:
                self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop; a run that ends early writes what there is."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank{torch.distributed.get_rank()}.json.gz"
        profiler.export_chrome_trace(str(path))
        say(f"profile of steps {self.start + 1} to {self.end}: {path}")
