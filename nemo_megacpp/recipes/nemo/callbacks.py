"""What a run records and shows of its steps."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.io import IOMixin

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.aux_loss import reduced_aux_losses


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


class RunRecorder(pl.Callback, IOMixin):
    """Append every step's metrics to a JSON-lines file, log auxiliary losses, show progress.

    Args:
        path: the file; only global rank 0 writes it.
        tokens_per_step: tokens of a global batch.
        log_interval: steps between progress lines.
    """

    def __init__(self, path: str, tokens_per_step: int, log_interval: int = 10):
        self.path = Path(path)
        self.tokens_per_step = tokens_per_step
        self.log_interval = log_interval
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)

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
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        record = {
            "step": trainer.global_step,
            "loss": _number(metrics.get("reduced_train_loss")),
            "grad_norm": _number(metrics.get("grad_norm")),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": seconds,
            "tokens_per_second": self.tokens_per_step / seconds,
            "aux": aux,
        }
        self._append(record)
        shown_steps = (1, trainer.max_steps)
        if trainer.global_step % self.log_interval == 0 or trainer.global_step in shown_steps:
            shown = " ".join(f"{name} {value:.3f}" for name, value in aux.items())
            print(
                f"step {trainer.global_step:>5}/{trainer.max_steps}  loss {record['loss']:.4f}  "
                f"{shown}  grad norm {record['grad_norm'] or 0.0:.3f}  "
                f"{record['tokens_per_second']:,.0f} tokens/s",
                flush=True,
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        loss = _number(trainer.callback_metrics.get("val_loss"))
        if trainer.is_global_zero and loss is not None:
            self._append({"step": trainer.global_step, "heldout_loss": loss})
            print(f"step {trainer.global_step:>5}  held-out loss {loss:.4f}", flush=True)

    def _append(self, record: dict[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}.") from None
