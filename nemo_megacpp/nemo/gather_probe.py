"""A Lightning callback that records the gathers of a run's first step, and ends the run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from megatron.core.utils import unwrap_model

from nemo_megacpp.nemo.proof_probe import Done
from nemo_megacpp.proof.gather_recorder import GatherRecorder, RecordedGather, tell_parts_apart
from nemo_megacpp.proof.step_result import disturb
from nemo_megacpp.proof.step_spec import StepSpec


class GatherProbe(pl.Callback):
    """Records every gather and all-to-all of the first step.

    Args:
        spec: what the run computes.
    """

    def __init__(self, spec: StepSpec):
        self._spec = spec
        self._recorder: GatherRecorder | None = None
        self.gathers: list[RecordedGather] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to record, with weights that differ from rank to rank where they are split."""
        parallel: Any = trainer.strategy.megatron_parallel  # type: ignore[attr-defined]
        chunks = list(unwrap_model([chunk.module for chunk in parallel]))
        disturb(self._spec, chunks)
        tell_parts_apart(chunks)
        self._recorder = GatherRecorder(chunks)
        self._recorder.__enter__()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """End the run after the backward pass."""
        assert self._recorder is not None
        self._recorder.__exit__(None, None, None)
        self.gathers = self._recorder.gathers
        raise Done
