"""The forward step that Bridge's ``pretrain`` is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.bridge.training.state import GlobalState
from megatron.core.utils import get_model_config

from nemo_megacpp.mixers.documents import packed_seq_params
from nemo_megacpp.mixers.sequence_layout import split_batch_for_cp
from nemo_megacpp.mixers.token_loss import microbatch_loss
from nemo_megacpp.runtime import heartbeat
from nemo_megacpp.side_channels import BATCH_PREFIX

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
    batch = read_batch(next(data_iterator))
    losses = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        packed_seq_params=batch["packed_seq_params"],
        side_channels=batch["side_channels"],
    )
    # An evaluation is the mean over all tokens, whatever the training averages over.
    per_token = get_model_config(model).calculate_per_token_loss or not model.training
    return losses, partial(_loss, batch["loss_mask"], per_token)


def read_batch(rows: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return this context-parallel rank's share of a microbatch, on its device.

    Args:
        rows: of the data loader, ``[b, s]``: ``tokens``, ``labels``, ``loss_mask``,
            ``position_ids``, the marks ``document_start`` of packed rows, ids of side channels.

    Raises:
        UserError: several marked rows in a microbatch, or documents that CP cannot split.
    """
    rows = dict(rows)
    starts = rows.pop("document_start", None)
    packed = None if starts is None else packed_seq_params(starts)
    device = torch.device(torch.cuda.current_device())
    here = split_batch_for_cp(
        {name: value.to(device, non_blocking=True) for name, value in rows.items()}, packed
    )
    if packed is not None:
        packed.cu_seqlens_q = packed.cu_seqlens_kv = packed.cu_seqlens_q.to(device)
    ids = {name: here.pop(name) for name in list(here) if name.startswith(BATCH_PREFIX)}
    channels = {name.removeprefix(BATCH_PREFIX): value for name, value in ids.items()}
    return {**here, "packed_seq_params": packed, "side_channels": channels}


def _loss(
    loss_mask: torch.Tensor, per_token: bool, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total, count, record = microbatch_loss(losses, loss_mask, per_token)
    return total, count, {LOSS: record}
