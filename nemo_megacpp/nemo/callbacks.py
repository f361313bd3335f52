"""What a run records and shows of its steps."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import resource
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.io import IOMixin

from nemo_megacpp.mixers.aux_loss import reduced_aux_losses
from nemo_megacpp.nemo.stops import StopOnSigterm
from nemo_megacpp.render import show_memory
from nemo_megacpp.runs.events import append_record
from nemo_megacpp.runtime.host import current_host


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def memory_now() -> int:
    """Return the bytes of this rank's tensors on the device, or of its process on a CPU."""
    if current_host().device == "cuda":
        return torch.cuda.memory_allocated()
    resident = Path("/proc/self/statm").read_text().split()[1]
    return int(resident) * resource.getpagesize()


def peak_memory(before: int) -> dict[str, float]:
    """Return the largest peak of any rank as ``memory``, and above ``before`` as ``memory_added``.

    In bytes: of the device's tensors, or of the process on a CPU. A collective over all ranks.
    """
    device = torch.cuda.current_device()
    if current_host().device == "cuda":
        here = torch.cuda.max_memory_allocated()
    else:
        here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    most = torch.tensor([here, here - before], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return dict(zip(("memory", "memory_added"), most.tolist(), strict=True))


class RunRecorder(pl.Callback, IOMixin):
    """Append every step's metrics to a JSON-lines file, log auxiliary losses, show progress.

    Args:
        path: the file; only global rank 0 writes it.
        log_interval: steps between progress lines.
    """

    def __init__(self, path: str, log_interval: int = 10):
        self.path = Path(path)
        self.log_interval = log_interval
        self._started = 0.0
        self._before = 0
        self._heldout: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._before = memory_now()  # the strategy builds the model after this

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        aux = reduced_aux_losses(pl_module.config, scale=1.0 / get_num_microbatches())
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        for name, value in aux.items():
            pl_module.log(name, torch.tensor(value), batch_size=1, rank_zero_only=True)
        step = trainer.global_step
        shown = step % self.log_interval == 0 or step in (1, trainer.max_steps)
        memory = peak_memory(self._before) if shown else {}
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        record = {
            "step": step,
            "loss": _number(metrics.get("reduced_train_loss")),
            "grad_norm": _number(metrics.get("grad_norm")),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": seconds,
            "tokens_per_second": data.global_batch_size * data.seq_length / seconds,
            "aux": aux,
            **memory,
        }
        append_record(self.path, record)
        if memory:
            self._show(record, trainer.max_steps)

    def _show(self, record: dict[str, Any], max_steps: int) -> None:
        parts = [f"step {record['step']:>5}/{max_steps}", f"loss {record['loss']:.4f}"]
        if self._heldout is not None:
            parts.append(f"held-out {self._heldout:.4f}")
        parts += [f"{name} {value:.3f}" for name, value in record["aux"].items()]
        parts += [
            f"grad norm {record['grad_norm'] or 0.0:.3f}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"{record['seconds']:.2f} s",
            show_memory(record["memory"]),
        ]
        print("  ".join(parts), flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(stop, StopOnSigterm) and stop.stopping for stop in callbacks):
            return  # broken off: the loss is of a part
        loss = _number(trainer.callback_metrics.get("val_loss"))
        if trainer.is_global_zero and loss is not None:
            self._heldout = loss
            append_record(self.path, {"step": trainer.global_step, "heldout_loss": loss})
            print(f"step {trainer.global_step:>5}  held-out loss {loss:.4f}", flush=True)
