"""The forward step that Bridge's ``pretrain`` is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.bridge.training.state import GlobalState
from megatron.core.utils import get_model_config

from nemo_megacpp.mixers.microbatch import deal_microbatch, run_microbatch
from nemo_megacpp.mixers.token_loss import microbatch_loss
from nemo_megacpp.runtime import heartbeat

LOSS = "lm loss"
"""Bridge's name for the loss that it logs."""


def hybrid_forward_step(
    state: GlobalState, data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Run one microbatch: Bridge's ``forward_step``, with packs, side channels and our loss.

    Returns:
        The token losses ``[b, s/cp]``, or on an earlier pipeline stage the hidden states; and the
        function that makes of the losses what Megatron's schedule differentiates.
    """
    heartbeat.progress()
    batch = deal_microbatch(next(data_iterator))
    losses = run_microbatch(model, batch)
    # An evaluation is the mean over all tokens, whatever the training averages over.
    per_token = get_model_config(model).calculate_per_token_loss or not model.training
    return losses, partial(_loss, batch["loss_mask"], per_token)


def _loss(
    loss_mask: torch.Tensor, per_token: bool, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total, count, record = microbatch_loss(losses, loss_mask, per_token)
    return total, count, {LOSS: record}
