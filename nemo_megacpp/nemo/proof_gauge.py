"""A Lightning callback that measures the steps of a proof: seconds, and peak memory."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_megacpp.nemo.proof_probe import Done
from nemo_megacpp.proof.peak_memory import PeakMemory
from nemo_megacpp.runtime.host import current_host

WARM_UP = 2
"""Steps before those that are timed: one that starts everything up, one whose memory is measured,
which takes longer."""


class Gauge(pl.Callback):
    """Measures a run of ``WARM_UP`` steps and those that are timed.

    Attributes:
        peak: most bytes of this rank's tensors in a step.
        seconds: of each timed step, on this rank.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.seconds: list[float] = []
        self._memory = PeakMemory()
        self._ended = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if current_host().device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if trainer.global_step > WARM_UP:
            self.seconds.append(now - self._ended)
        elif trainer.global_step == WARM_UP:
            self.peak = self._memory.stop()
        else:
            self._memory.start()
        self._ended = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        raise Done  # before the run saves its last state
