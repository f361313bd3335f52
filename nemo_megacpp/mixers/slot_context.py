"""The states of several sequences, each in a slot of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from nemo_megacpp.core.inference import all_logits
from nemo_megacpp.mixers.prompt_pack import PromptPack


class SlotContext(StaticInferenceContext):
    """Megatron's inference context for sequences of different lengths.

    Megatron's static context has one length for its whole batch. Here each slot has its own: a
    forward pass names the slots of its rows (:meth:`select`), or those of the prompts that it packs
    into one row (:meth:`select_pack`), reads and writes their states alone, and :meth:`advance`
    counts its tokens.

    Args:
        slots: sequences that the context holds at once.
        max_sequence_length: tokens of the longest one; attention allocates keys and values for it.
        logits: of which tokens the model returns logits, the ``last`` one given of each sequence
            ``[b, 1, v]``, or ``all``.

    Attributes:
        lengths: tokens that each slot has seen.
        pack: the prompts that the next forward pass packs into one row, None where its rows are
            sequences.
        key_value_memory_dict: by layer number, from 1, that layer's tensors, ``[slots, …]``:
            attention's keys and values ``[slots, t, g, d]``, a recurrent mixer's states.
    """

    key_value_memory_dict: dict[int, tuple[torch.Tensor, ...]]

    def __init__(self, slots: int, max_sequence_length: int, logits: str = "last"):
        super().__init__(slots, max_sequence_length)
        self._all_logits = logits == "all"
        all_logits(self, wanted=self._all_logits)
        self.lengths = [0] * slots
        self.pack: PromptPack | None = None
        self._batch: tuple[int, ...] = ()
        self._tokens: tuple[int, ...] = ()

    def select(self, slots: Sequence[int], tokens: int) -> None:
        """Choose the slots of the rows of the next forward pass.

        Args:
            slots: the slot of each row of the batch.
            tokens: that each row brings: a prompt, a part of one, or one token.
        """
        self._choose(slots, [tokens] * len(slots), None)

    def select_pack(self, slots: Sequence[int], tokens: Sequence[int], device: Any = None) -> None:
        """Choose the slots of prompts that the next forward pass packs into one row, one after
        another: new sequences, of which the slots hold nothing yet.

        Args:
            slots: of the prompts.
            tokens: that each one has, at least one.
            device: of the model.
        """
        assert not any(self.lengths[slot] for slot in slots), "a pack begins sequences"
        self._choose(slots, tokens, PromptPack(tokens, device))

    def _choose(self, slots: Sequence[int], tokens: Sequence[int], pack: PromptPack | None) -> None:
        assert len(set(slots)) == len(slots) == len(tokens) > 0, slots
        self._batch, self._tokens, self.pack = tuple(slots), tuple(tokens), pack
        assert self.longest <= self.max_sequence_length, (self.longest, self.max_sequence_length)
        # Megatron reads these two.
        self.sequence_len_offset = min(self.lengths[slot] for slot in slots)
        self.decode_mode = set(tokens) == {1} and self.sequence_len_offset > 0

    def advance(self) -> None:
        """Count the tokens of the forward pass that was run."""
        for slot, tokens in zip(self._batch, self._tokens, strict=True):
            self.lengths[slot] += tokens

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
    def sequences(self) -> int:
        """Sequences of the batch."""
        return len(self._batch)

    @property
    def rows(self) -> slice | torch.Tensor:
        """What selects the slots of the batch along the first axis of a state: neighbours as a
        view."""
        first, count = self._batch[0], len(self._batch)
        if self._batch == tuple(range(first, first + count)):
            return slice(first, first + count)
        return torch.tensor(self._batch)

    @property
    def longest(self) -> int:
        """Tokens of the batch's longest sequence, with those of this pass."""
        return max(map(sum, zip(self._lengths(), self._tokens, strict=True)))

    def positions(self, device: Any = None) -> torch.Tensor:
        """Return the position of each token of the batch in its sequence, ``[b, s]``."""
        if self.pack is not None:
            return self.pack.positions
        starts = torch.tensor(self._lengths(), device=device)
        return starts[:, None] + torch.arange(self._tokens[0], device=device)

    def slots(self, device: Any = None) -> torch.Tensor:
        """Return the slot of each token of the batch, as :meth:`positions` or ``[b, 1]``."""
        slots = torch.tensor(self._batch, device=device)
        return slots[:, None] if self.pack is None else slots[self.pack.sequence_of]

    def packed_seq_params(self) -> PackedSeqParams | None:
        """Return the sequences of the row of a pack for Megatron's modules, else None."""
        return None if self.pack is None else self.pack.packed_seq_params

    def with_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the tokens whose logits the model returns, of all ``[s, b, h]``.

        Megatron's model takes the last token of a row. Of a pack, the last token of each sequence
        is the last of a row here, ``[1, n, h]``.
        """
        if self.pack is None or self._all_logits:
            return hidden_states
        return hidden_states[self.pack.last].transpose(0, 1)

    def _lengths(self) -> list[int]:
        return [self.lengths[slot] for slot in self._batch]

    @property
    def mask_type(self) -> AttnMaskType:
        """How the batch's queries see the keys that lie in the cache."""
        starts = set(self._lengths())
        if starts == {0}:
            return AttnMaskType.causal
        if len(starts) == 1 and self._tokens[0] == 1:
            return AttnMaskType.no_mask
        return AttnMaskType.arbitrary

    def attention_mask(self, device: Any = None) -> torch.Tensor | None:
        """Return the mask of an ``arbitrary`` :attr:`mask_type`, ``[b, 1, s, t]``, true where a
        query does not see a key, as Megatron has it; None for the others."""
        if self.mask_type != AttnMaskType.arbitrary:
            return None
        keys = torch.arange(self.longest, device=device)
        return (self.positions(device)[:, :, None] < keys).unsqueeze(1)
