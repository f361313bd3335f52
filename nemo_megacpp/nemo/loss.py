"""The training loss: the same mean, and the same gradients, in every layout."""

# NeMo-Run reads these annotations at run time (data.seed=3), so they are not postponed.

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

_RECORD = "loss_sum_and_ub_size"
"""NeMo's name for what a microbatch adds to the logged loss: a numerator and a denominator."""


class HybridLossReduction(MaskedTokenLossReduction):
    """Masked mean of the token losses, for any loss mask over any context-parallel split.

    Without ``calculate_per_token_loss`` the loss of a step is the mean over microbatches of the
    mean over their unmasked tokens. With it, it is the mean over all unmasked tokens of the global
    batch. Neither depends on the layout, because a microbatch is ``micro_batch_size`` consecutive
    rows in all of them.

    NeMo's ``MaskedTokenLossReduction``, like the loss function of Megatron's scripts, divides by
    the unmasked tokens of one context-parallel rank and averages over the ranks. That is another
    mean as soon as the ranks have different numbers of them.

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
        losses = forward_out.reshape(-1)
        if losses.dtype != torch.float64:
            losses = losses.float()
        mask = batch["loss_mask"].reshape(-1).to(losses)
        total, tokens = torch.sum(losses * mask), mask.sum()
        if self.per_token or self.validation_step:
            record = torch.stack([total.detach().double(), tokens.double()])
            return total, tokens.to(torch.int), {_RECORD: record}
        group = parallel_state.get_context_parallel_group()
        everyone = tokens.clone()
        if group.size() > 1:
            torch.distributed.all_reduce(everyone, group=group)
        # The data-parallel gradient average that follows is over dp·cp ranks, and this is a sum
        # over cp.
        total = total * group.size()
        mean = total.detach().double() / everyone.clamp(min=1)
        record = torch.stack([mean, torch.ones_like(mean)])
        return total, everyone.to(torch.int), {_RECORD: record}

    def reduce(self, losses_reduced_per_micro_batch: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Return the loss of the global batch in float32: the number that the step trains on."""
        return self.mean(losses_reduced_per_micro_batch).float()

    def mean(self, losses_reduced_per_micro_batch: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Return the loss of the global batch in float64; a collective over dp·cp."""
        if not losses_reduced_per_micro_batch:
            return torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
        totals = torch.stack([record[_RECORD] for record in losses_reduced_per_micro_batch]).sum(0)
        torch.distributed.all_reduce(
            totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        return totals[0] / totals[1].clamp(min=1)
