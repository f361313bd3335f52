"""The states of several sequences, each in a slot of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.enums import AttnMaskType

from nemo_megacpp.core.inference import all_logits


class SlotContext(StaticInferenceContext):
    """Megatron's inference context for sequences of different lengths.

    Megatron's static context has one length for its whole batch. Here each slot has its own: a
    forward pass names the slots of its rows (:meth:`select`), reads and writes their states alone,
    and :meth:`advance` counts its tokens.

    Args:
        slots: sequences that the context holds at once.
        max_sequence_length: tokens of the longest one; attention allocates keys and values for it.
        logits: of which tokens the model returns logits, the ``last`` one given or ``all``.

    Attributes:
        lengths: tokens that each slot has seen.
        key_value_memory_dict: by layer number, from 1, that layer's tensors, ``[slots, …]``:
            attention's keys and values ``[slots, t, g, d]``, a recurrent mixer's states.
    """

    key_value_memory_dict: dict[int, tuple[torch.Tensor, ...]]

    def __init__(self, slots: int, max_sequence_length: int, logits: str = "last"):
        super().__init__(slots, max_sequence_length)
        all_logits(self, wanted=logits == "all")
        self.lengths = [0] * slots
        self._batch: tuple[int, ...] = ()
        self._tokens = 0

    def select(self, slots: Sequence[int], tokens: int) -> None:
        """Choose the slots of the rows of the next forward pass.

        Args:
            slots: the slot of each row of the batch.
            tokens: that each row brings: a prompt, a part of one, or one token.
        """
        assert len(set(slots)) == len(slots) > 0, slots
        self._batch, self._tokens = tuple(slots), tokens
        longest = max(self.lengths[slot] for slot in slots) + tokens
        assert longest <= self.max_sequence_length, (longest, self.max_sequence_length)
        # Megatron reads these two.
        self.sequence_len_offset = min(self.lengths[slot] for slot in slots)
        self.decode_mode = tokens == 1 and self.sequence_len_offset > 0

    def advance(self) -> None:
        """Count the tokens of the forward pass that was run."""
        for slot in self._batch:
            self.lengths[slot] += self._tokens

    def clear(self, slot: int) -> None:
        """Empty a slot: its states are zero, as before a sequence, and its length is too.

        Keys and values are cleared with them: a mask leaves them out with a weight of zero, and
        zero times a NaN of an earlier sequence is a NaN.
        """
        for tensors in self.key_value_memory_dict.values():
            for tensor in tensors:
                tensor[slot].zero_()
        self.lengths[slot] = 0

    def reset(self) -> None:
        """Empty all slots."""
        super().reset()
        for slot in range(self.max_batch_size):
            self.clear(slot)

    @property
    def rows(self) -> slice | torch.Tensor:
        """What selects the batch's slots along the first axis of a state: neighbours as a view."""
        first, count = self._batch[0], len(self._batch)
        if self._batch == tuple(range(first, first + count)):
            return slice(first, first + count)
        return torch.tensor(self._batch)

    @property
    def longest(self) -> int:
        """Tokens of the batch's longest sequence, with those of this pass."""
        return max(self.lengths[slot] for slot in self._batch) + self._tokens

    def positions(self, device: Any = None) -> torch.Tensor:
        """Return the position of each token of the batch in its sequence, ``[b, s]``."""
        starts = torch.tensor([self.lengths[slot] for slot in self._batch], device=device)
        return starts[:, None] + torch.arange(self._tokens, device=device)

    @property
    def mask_type(self) -> AttnMaskType:
        """How the batch's queries see the keys that lie in the cache."""
        starts = {self.lengths[slot] for slot in self._batch}
        if starts == {0}:
            return AttnMaskType.causal
        if len(starts) == 1 and self._tokens == 1:
            return AttnMaskType.no_mask
        return AttnMaskType.arbitrary

    def attention_mask(self, device: Any = None) -> torch.Tensor | None:
        """Return the mask of an ``arbitrary`` :attr:`mask_type`, ``[b, 1, s, t]``, true where a
        query does not see a key, as Megatron has it; None for the others."""
        if self.mask_type != AttnMaskType.arbitrary:
            return None
        keys = torch.arange(self.longest, device=device)
        return (self.positions(device)[:, :, None] < keys).unsqueeze(1)
