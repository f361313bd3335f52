"""Sequences in slots: add, step, remove, without touching the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from nemo_megacpp.errors import UserError
from nemo_megacpp.inference.stages import forward_over_stages
from nemo_megacpp.mixers.slot_context import SlotContext
from nemo_megacpp.specs.hybrid_model import HybridModel

MOST_PACKED = 256
"""Tokens of prompts that go through the model in one pass. On a CPU, a few tokens of each together
take a fifth to four fifths of the time of a pass for each prompt; above some 300 tokens in all they
take about the same (``python -m benchmarks.prefill``)."""


class SlotBatch:
    """A model and the states of the sequences that it continues, each in a slot.

    Every rank of the model makes the same calls, on all pipeline stages, and gets the same logits.

    Args:
        model: built and loaded, this rank's stage of it; it is put into evaluation mode.
        slots: sequences at once.
        max_length: tokens of the longest sequence, its prompt included.
        vocab_size: tokens of the tokenizer; the logits beyond are padding.
        most_packed: tokens of prompts that go through the model in one pass; a longer prompt has
            one of its own.

    Raises:
        UserError: the model has no generation, or not in its layout
            (:mod:`nemo_megacpp.specs.inference`).
    """

    def __init__(
        self,
        model: HybridModel,
        slots: int,
        max_length: int,
        vocab_size: int,
        most_packed: int = MOST_PACKED,
    ):
        if slots < 1 or max_length < 1:
            raise UserError(f"slots={slots} and max_length={max_length} must be at least 1.")
        self.model, self.vocab_size, self.max_length = model.eval(), vocab_size, max_length
        self.most_packed = most_packed
        self._context = SlotContext(slots, max_length)
        self._free = list(range(slots))
        self._device = next(model.parameters()).device
        # On all stages, before one of them waits for another.
        model.decoder.check_inference(self._context, None)

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
        return self.add_all([tokens])[0]

    def add_all(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, torch.Tensor]]:
        """Begin several sequences of any lengths, at most ``most_packed`` tokens in a pass.

        Args:
            prompts: their tokens; each goes through the model whole.

        Returns:
            The slot of each, and the logits of its next token ``[v]``, as :meth:`add` would give.

        Raises:
            UserError: there are fewer free slots, no tokens, or too many.
        """
        if len(prompts) > len(self._free):
            raise UserError(
                f"All {len(self._context.lengths)} slots hold a sequence."
                if not self._free
                else f"{len(prompts)} sequences do not fit the {len(self._free)} free slots."
            )
        slots = self._free[: len(prompts)]
        for slot, tokens in zip(slots, prompts, strict=True):
            self._validate(slot, len(tokens))
        added = []
        for part in self._passes(prompts):
            logits = self._run(slots[part], [list(tokens) for tokens in prompts[part]])
            added += list(zip(slots[part], logits, strict=True))
        self._free = self._free[len(prompts) :]
        return added

    def _passes(self, prompts: Sequence[Sequence[int]]) -> Iterator[slice]:
        """Yield which prompts go through the model together."""
        first, tokens = 0, 0
        for number, prompt in enumerate(prompts):
            full = tokens + len(prompt) > self.most_packed or not self.model.decoder.packs_prompts
            if number > first and full:
                yield slice(first, number)
                first, tokens = number, 0
            tokens += len(prompt)
        if prompts:
            yield slice(first, len(prompts))

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

    def _run(self, slots: list[int], tokens: list[list[int]]) -> torch.Tensor:
        """Return the logits after each sequence's last token, ``[n, v]``. Sequences that bring
        different numbers of tokens begin here."""
        context, lengths = self._context, [len(each) for each in tokens]
        if len(set(lengths)) == 1:
            context.select(slots, lengths[0])
            rows = tokens
        else:
            context.select_pack(slots, lengths, self._device)
            rows = [[token for each in tokens for token in each]]
        ids = torch.tensor(rows, device=self._device)
        logits = forward_over_stages(self.model, ids, context)
        context.advance()
        return logits[:, : self.vocab_size]
