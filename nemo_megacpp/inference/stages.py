"""A forward pass over pipeline stages, whose logits every stage gets."""

from __future__ import annotations

import torch
from megatron.core.inference.communication_utils import (
    recv_from_prev_pipeline_rank_,
    send_to_next_pipeline_rank,
)

from nemo_megacpp.core.inference import inference_mode
from nemo_megacpp.mixers.slot_context import SlotContext
from nemo_megacpp.specs.hybrid_model import HybridModel


@torch.no_grad()
def forward_over_stages(
    model: HybridModel, ids: torch.Tensor, context: SlotContext
) -> torch.Tensor:
    """Run one pass through an inference context: stage after stage, as Megatron's inference wrapper
    (``AbstractModelInferenceWrapper``) does with a small batch.

    A stage receives what the one before sends, the hidden states and what the stack declares beside
    them (:mod:`nemo_megacpp.specs.payload`), in a tensor whose shape all ranks know. The last one
    broadcasts the logits.

    Args:
        model: this rank's stage.
        ids: of the tokens, ``[b, s]``, on every stage.
        context: has chosen the ``n`` sequences of the rows.

    Returns:
        The logits of each sequence's next token, ``[n, v]``, on every rank.
    """
    config, group = model.config, model.pg_collection.pp
    last = group.size() - 1
    if group.rank() > 0:
        batch, tokens = ids.shape
        shape = model.decoder.received_shape(tokens, batch)
        received = torch.empty(shape, dtype=config.pipeline_dtype, device=ids.device)
        recv_from_prev_pipeline_rank_(received, group)
        model.set_input_tensor(received)
    with inference_mode():
        output = model(ids, None, None, inference_context=context, runtime_gather_output=True)
    if group.size() == 1:
        return output[:, -1]
    if group.rank() < last:
        send_to_next_pipeline_rank(output.to(config.pipeline_dtype), group)
        size = context.sequences, model.vocab_size
        logits = output.new_empty(size, dtype=config.params_dtype)
    else:
        logits = output[:, -1].to(config.params_dtype).contiguous()
    source = torch.distributed.get_global_rank(group, last)
    torch.distributed.broadcast(logits, src=source, group=group)
    return logits
