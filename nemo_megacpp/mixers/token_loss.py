"""The training loss: the same mean, and the same gradients, in every layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state


def microbatch_loss(
    losses: torch.Tensor, loss_mask: torch.Tensor, per_token: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what Megatron's schedule differentiates, what it divides that by, and the record.

    Without ``per_token`` the loss of a step is the mean over microbatches of the mean over their
    unmasked tokens. With it, it is the mean over all unmasked tokens of the global batch. Neither
    depends on the layout, because a microbatch is ``micro_batch_size`` consecutive rows in all of
    them. The loss function of Megatron's scripts divides by the unmasked tokens of one
    context-parallel rank and averages over the ranks, which is another mean as soon as the ranks
    have different numbers of them.

    Args:
        losses: of the tokens, ``[b, s/cp]``.
        loss_mask: ``[b, s/cp]``.
        per_token: whether the model has ``calculate_per_token_loss``.

    Returns:
        The sum and the count for the schedule, and the record: a numerator and a denominator of the
        logged loss, float64 ``[2]``.
    """
    losses = losses.reshape(-1)
    if losses.dtype != torch.float64:
        losses = losses.float()
    mask = loss_mask.reshape(-1).to(losses)
    total, tokens = torch.sum(losses * mask), mask.sum()
    if per_token:
        record = torch.stack([total.detach().double(), tokens.double()])
        return total, tokens.to(torch.int), record
    group = parallel_state.get_context_parallel_group()
    everyone = tokens.clone()
    if group.size() > 1:
        torch.distributed.all_reduce(everyone, group=group)
    # The data-parallel gradient average that follows is over dp·cp ranks, and this is a sum
    # over cp.
    total = total * group.size()
    mean = total.detach().double() / everyone.clamp(min=1)
    return total, everyone.to(torch.int), torch.stack([mean, torch.ones_like(mean)])


def batch_loss(records: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the loss of the global batch in float64 from the records of this rank's microbatches;
    a collective over dp·cp."""
    if not records:
        return torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    totals = torch.stack(list(records)).sum(0)
    torch.distributed.all_reduce(
        totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    return totals[0] / totals[1].clamp(min=1)
