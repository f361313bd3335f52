"""Megatron's ``SelfAttention`` on sequences of different lengths."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention

from nemo_megacpp.mixers.slot_context import SlotContext


class SlotSelfAttention(SelfAttention):
    """Megatron's ``SelfAttention``, which also keeps keys and values in the slots of a
    :class:`SlotContext`. Trains as Megatron's, and takes its static context as Megatron's does.

    Keys lie in the cache with their rotation, so that a step turns one key and not all of them.
    """

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary_pos_emb: tuple[torch.Tensor, torch.Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        if not isinstance(inference_context, SlotContext):
            return tuple(
                super()._adjust_key_value_for_inference(
                    inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
                )
            )
        context = inference_context
        positions = context.positions(key.device)
        if rotary_pos_emb is not None:
            # [s, b, 1, d]: each row of the batch has its own positions.
            turns = [of[positions.T].flatten(2, 3) for of in rotary_pos_emb]
            query, key = (
                apply_rotary_pos_emb(
                    tensor, turn, config=self.config, cp_group=self.pg_collection.cp
                )
                for tensor, turn in zip((query, key), turns, strict=True)
            )
        if self.layer_number not in context.key_value_memory_dict:
            slots, length = context.max_batch_size, context.max_sequence_length
            context.key_value_memory_dict[self.layer_number] = tuple(
                new.new_zeros(slots, length, *new.shape[2:]) for new in (key, value)
            )
        seen = []
        for memory, new in zip(
            context.key_value_memory_dict[self.layer_number], (key, value), strict=True
        ):
            memory[context.slots(memory.device), positions] = new.transpose(0, 1)
            if context.pack is None:
                seen.append(memory[context.rows, : context.longest].transpose(0, 1))
            else:  # prompts, which see no keys but their own
                seen.append(new)
        return query, *seen, None, context.mask_type, None
