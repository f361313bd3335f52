"""Sequences in slots: add, step, remove, without touching the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from nemo_megacpp.core.inference import inference_mode
from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.slot_context import SlotContext
from nemo_megacpp.specs.hybrid_model import HybridModel


class SlotBatch:
    """A model and the states of the sequences that it continues, each in a slot.

    Every rank of the model's tensor-parallel group makes the same calls.

    Args:
        model: built and loaded; it is put into evaluation mode.
        slots: sequences at once.
        max_length: tokens of the longest sequence, its prompt included.
        vocab_size: tokens of the tokenizer; the logits beyond are padding.
    """

    def __init__(self, model: HybridModel, slots: int, max_length: int, vocab_size: int):
        if slots < 1 or max_length < 1:
            raise UserError(f"slots={slots} and max_length={max_length} must be at least 1.")
        self.model, self.vocab_size, self.max_length = model.eval(), vocab_size, max_length
        self._context = SlotContext(slots, max_length)
        self._free = list(range(slots))
        self._device = next(model.parameters()).device

    @property
    def free(self) -> int:
        """Slots that hold no sequence."""
        return len(self._free)

    @property
    def used(self) -> tuple[int, ...]:
        """Slots that hold one."""
        return tuple(slot for slot in range(len(self._context.lengths)) if slot not in self._free)

    @property
    def state_bytes(self) -> int:
        """Bytes of all slots' states on this rank, allocated in the first pass."""
        memory = self._context.key_value_memory_dict.values()
        return sum(tensor.nbytes for tensors in memory for tensor in tensors)

    def length(self, slot: int) -> int:
        """Return the tokens that a slot's sequence has."""
        return self._context.lengths[slot]

    def add(self, tokens: Sequence[int]) -> tuple[int, torch.Tensor]:
        """Begin a sequence: run all of ``tokens`` in one pass.

        Returns:
            Its slot, and the logits of the next token ``[v]``.

        Raises:
            UserError: no slot is free, there are no tokens, or too many.
        """
        if not self._free:
            raise UserError(f"All {len(self._context.lengths)} slots hold a sequence.")
        slot = self._free[0]
        self._validate(slot, len(tokens))
        (logits,) = self._run([slot], [list(tokens)])
        self._free.remove(slot)
        return slot, logits

    def extend(self, slot: int, tokens: Sequence[int]) -> torch.Tensor:
        """Continue a sequence with several tokens in one pass; return the next logits ``[v]``.

        Raises:
            UserError: there are no tokens, or too many.
        """
        self._validate(slot, len(tokens))
        (logits,) = self._run([slot], [list(tokens)])
        return logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """Give one token to each of some slots, in one pass.

        Args:
            tokens: by slot.

        Returns:
            The logits ``[v]`` of the next token, by slot.

        Raises:
            UserError: a sequence is as long as it may become.
        """
        slots = sorted(tokens)
        for slot in slots:
            self._validate(slot, 1)
        logits = self._run(slots, [[tokens[slot]] for slot in slots])
        return dict(zip(slots, logits, strict=True))

    def remove(self, slot: int) -> None:
        """End a sequence; its slot can be used again."""
        assert slot not in self._free, slot
        self._context.clear(slot)
        self._free = sorted([*self._free, slot])

    def _validate(self, slot: int, tokens: int) -> None:
        have = self._context.lengths[slot]
        if not tokens:
            raise UserError("A sequence begins with at least one token.")
        if have + tokens > self.max_length:
            raise UserError(
                f"A sequence of {have + tokens:,} tokens does not fit the slots, which hold "
                f"{self.max_length:,}."
            )

    @torch.no_grad()
    def _run(self, slots: list[int], tokens: list[list[int]]) -> torch.Tensor:
        """Return the logits after each row's last token, ``[b, v]``."""
        context = self._context
        context.select(slots, len(tokens[0]))
        ids = torch.tensor(tokens, device=self._device)
        with inference_mode():
            logits = self.model(
                ids, None, None, inference_context=context, runtime_gather_output=True
            )
        context.advance()
        return logits[:, -1, : self.vocab_size]
