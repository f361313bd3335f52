"""Losses of a held-out split, on the ranks of a layout: Megatron's forward-only schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch.utils.data import default_collate

from nemo_megacpp.checkpoint.weights import build_saved_model, load_weights
from nemo_megacpp.evaluation.rows import HeldoutRows
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.documents import packed_seq_params
from nemo_megacpp.mixers.sequence_layout import split_batch_for_cp
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.side_channels import BATCH_PREFIX
from nemo_megacpp.specs.payload import schedule_seq_length

Dtype = Literal["float32", "bfloat16", "float64"]

_BATCHES_IN_FLIGHT = 4
"""Microbatches of one call of the schedule, per pipeline stage."""


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        checkpoint: of any kind.
        model: fields of an identity, with the ``seq_length`` of the rows.
        layout: of the ranks.
        dtype: of parameters and activations; ``bfloat16`` is Megatron's mixed precision.
        rows: to predict.
        micro_batch_size: rows that a data-parallel rank computes at a time.
    """

    checkpoint: Path
    model: Mapping[str, Any]
    layout: ParallelLayout
    dtype: Dtype
    rows: HeldoutRows
    micro_batch_size: int = 1


class Losses(NamedTuple):
    """Sums over all rows, float64.

    Attributes:
        total: of the losses at each place of a row, in nats, ``[s]``.
        tokens: that were predicted there, ``[s]``.
        not_finite: tokens whose loss is NaN or Inf, which ``total`` leaves out, ``[s]``.
    """

    total: np.ndarray
    tokens: np.ndarray
    not_finite: np.ndarray


def evaluate_on_rank(request: Request) -> Losses | None:
    """Evaluate on every rank of a layout; the process groups do not exist yet.

    The bytes of the checkpoint were compared with its manifest before.

    Returns:
        The sums, on rank 0.

    Raises:
        UserError: a checkpoint that cannot be loaded into the model, or damaged data.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)  # as in training
    layout = request.layout
    start_model_parallel(layout)
    dtype = getattr(torch, request.dtype)
    config, chunks = build_saved_model(request.model, layout, dtype)
    model = [Float16Module(config, chunk) if config.bf16 else chunk for chunk in chunks]
    load_weights(chunks, request.checkpoint, verify=False)
    sums = torch.zeros(3, config.seq_length, dtype=torch.float64, device=_device())
    indices = _own_microbatches(request)
    most = _BATCHES_IN_FLIGHT * layout.pp
    for begin in range(0, len(indices), most):
        here = indices[begin : begin + most]
        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=partial(_forward_step, sums),
                data_iterator=[_microbatches(request, here) for _ in model],
                model=model,
                num_microbatches=len(here),
                seq_length=schedule_seq_length(
                    config.pattern.letters, config, config, config.seq_length
                ),
                micro_batch_size=request.micro_batch_size,
                forward_only=True,
            )
    if parallel_state.get_tensor_model_parallel_rank():
        sums.zero_()  # every rank of a tensor-parallel group has the losses of its tokens
    torch.distributed.all_reduce(sums)
    return None if torch.distributed.get_rank() else Losses(*sums.cpu().numpy())


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device())


def _own_microbatches(request: Request) -> list[int | None]:
    """Return the numbers of this data-parallel rank's microbatches.

    All ranks have as many, and with virtual stages a multiple of PP, as the schedule needs; None is
    one that counts for nothing.
    """
    dp, rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    total = -(-len(request.rows) // request.micro_batch_size)
    most = -(-total // dp)
    if request.layout.vpp is not None:
        most = -(-most // request.layout.pp) * request.layout.pp
    numbers = range(rank, dp * most, dp)
    return [number if number < total else None for number in numbers]


def _microbatches(request: Request, numbers: list[int | None]) -> Iterator[dict[str, Any]]:
    """Yield microbatches, dealt to this context-parallel rank."""
    rows, size = request.rows, request.micro_batch_size
    for number in numbers:
        first = 0 if number is None else number * size
        members = []
        for index in range(first, first + size):
            row = rows[min(index, len(rows) - 1)]
            if number is None or index >= len(rows):
                row["loss_mask"] = torch.zeros_like(row["loss_mask"])
            members.append(row)
        batch = default_collate(members)
        begins = batch.pop("document_start", None)
        packed = None if begins is None else packed_seq_params(begins)
        here = split_batch_for_cp({k: v.to(_device()) for k, v in batch.items()}, packed)
        ids = {name: here.pop(name) for name in list(here) if name.startswith(BATCH_PREFIX)}
        channels = {name.removeprefix(BATCH_PREFIX): value for name, value in ids.items()}
        yield {**here, "packed_seq_params": packed, "side_channels": channels}


def _forward_step(
    sums: torch.Tensor, data: Iterator[dict[str, Any]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Run one microbatch and add its losses to ``sums``: Megatron's ``forward_step_func``."""
    batch = next(data)
    output = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        packed_seq_params=batch["packed_seq_params"],
        side_channels=batch["side_channels"],
    )

    def add(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        counted = batch["loss_mask"] > 0
        places, losses = batch["place"][counted], losses[counted].double()
        finite = losses.isfinite()
        zeros = losses.new_zeros(())
        sums[0].index_add_(0, places, torch.where(finite, losses, zeros))
        sums[1].index_add_(0, places, torch.ones_like(losses))
        sums[2].index_add_(0, places, (~finite).double())
        # What a training step would differentiate.
        return zeros, torch.ones((), dtype=torch.int, device=zeros.device), {}

    return output, add
