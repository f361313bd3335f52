"""The length of the messages between pipeline stages, as Megatron's schedule must be told it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from nemo_megacpp.errors import UserError
from nemo_megacpp.specs.payload import schedule_seq_length


class ScheduleLength(pl.Callback):
    """Calls the schedule with :func:`nemo_megacpp.specs.payload.schedule_seq_length`.

    The model attaches it itself, so it is there under any strategy. NeMo's data sampler gives a
    step the tokens of a row; this event comes after that and before the schedule.
    """

    def on_megatron_microbatches_start(self, step: Any) -> None:
        """Set the step's ``seq_length``; a model whose stages send nothing but hidden states, or
        shapes, keeps it.

        Args:
            step: NeMo's ``MegatronStep``.

        Raises:
            UserError: a data module whose batches give the schedule a length of their own.
        """
        config = step.pl_module.config
        told = schedule_seq_length(config.pattern.letters, config, config, step.seq_length)
        if told == step.seq_length:
            return
        if step.has_global_batch_sampler:
            raise UserError(
                "data.data_sampler.dataloader_type='batch': NeMo then tells the schedule the "
                "length of each batch, and with m2rnn_depth_state and virtual stages a message is "
                "longer. Legal: 'single', 'cyclic'."
            )
        step.seq_length = told
