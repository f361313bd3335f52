"""A microbatch on this rank: its rows dealt over CP, and the pass through a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nemo_megacpp.mixers.documents import packed_seq_params
from nemo_megacpp.mixers.sequence_layout import split_batch_for_cp
from nemo_megacpp.side_channels import BATCH_PREFIX

_ROWS = ("tokens", "labels", "loss_mask", "position_ids")


def deal_microbatch(rows: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return this context-parallel rank's share of a microbatch, on its device.

    Every pipeline stage gets all of it: a layer of any stage may own a side channel, and the ids
    are few beside what a stage sends.

    Args:
        rows: of a data loader, ``[b, s]``: ``tokens``, ``labels``, ``loss_mask``,
            ``position_ids``, the marks ``document_start`` of packed rows, ids of side channels.
            Others are left out.

    Returns:
        The four, ``[b, s/cp]``; ``packed_seq_params``, None for rows of one document; and
        ``side_channels``, the ids ``[b, s/cp]`` by name.

    Raises:
        UserError: several marked rows in a microbatch, or documents that CP cannot split.
    """
    starts = rows.get("document_start")
    packed = None if starts is None else packed_seq_params(starts.cpu())
    device = torch.device(torch.cuda.current_device())
    here = split_batch_for_cp(
        {
            name: value.to(device, non_blocking=True)
            for name, value in rows.items()
            if name in _ROWS or name.startswith(BATCH_PREFIX)
        },
        packed,
    )
    if packed is not None:
        packed.cu_seqlens_q = packed.cu_seqlens_kv = packed.cu_seqlens_q.to(device)
    ids = {name: here.pop(name) for name in list(here) if name.startswith(BATCH_PREFIX)}
    channels = {name.removeprefix(BATCH_PREFIX): value for name, value in ids.items()}
    return {**here, "packed_seq_params": packed, "side_channels": channels}


def run_microbatch(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return a model's token losses ``[b, s/cp]``, or on an earlier stage its hidden states.

    No mask is passed: attention is causal by its mask type.

    Args:
        model: a chunk, wrapped or not.
        batch: of :func:`deal_microbatch`.
    """
    return model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=batch["packed_seq_params"],
        side_channels=batch["side_channels"],
    )
