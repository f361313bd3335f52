"""NeMo's loss reduction with the package's loss (:mod:`nemo_megacpp.mixers.token_loss`)."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

from collections.abc import Sequence
from typing import Any

import torch
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

from nemo_megacpp.mixers.token_loss import batch_loss, microbatch_loss

_RECORD = "loss_sum_and_ub_size"
"""NeMo's name for what a microbatch adds to the logged loss: a numerator and a denominator."""


class HybridLossReduction(MaskedTokenLossReduction):
    """Masked mean of the token losses, for any loss mask over any context-parallel split.

    NeMo's ``MaskedTokenLossReduction`` divides by the unmasked tokens of one context-parallel rank
    (:func:`nemo_megacpp.mixers.token_loss.microbatch_loss`).

    Args:
        per_token: whether the model has ``calculate_per_token_loss``.
        validation_step: log the mean over all tokens, whatever the training averages over.
    """

    def __init__(self, per_token: bool, validation_step: bool = False):
        super().__init__(validation_step=validation_step)
        self.per_token = per_token

    def forward(
        self, batch: dict[str, torch.Tensor], forward_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return what Megatron's schedule differentiates, what it divides that by, and the record.

        Args:
            batch: holds ``loss_mask``, ``[b, s/cp]``.
            forward_out: token losses, ``[b, s/cp]``.
        """
        total, count, record = microbatch_loss(
            forward_out, batch["loss_mask"], self.per_token or self.validation_step
        )
        return total, count, {_RECORD: record}

    def reduce(self, losses_reduced_per_micro_batch: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Return the loss of the global batch in float32: the number that the step trains on."""
        return self.mean(losses_reduced_per_micro_batch).float()

    def mean(self, losses_reduced_per_micro_batch: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Return the loss of the global batch in float64; a collective over dp·cp."""
        return batch_loss([record[_RECORD] for record in losses_reduced_per_micro_batch])
