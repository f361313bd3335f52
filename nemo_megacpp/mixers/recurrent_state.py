"""The states of recurrent mixers in Megatron's inference context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nemo_megacpp.mixers.slot_context import SlotContext

Shape = tuple[tuple[int, ...], torch.dtype]
"""Shape of a tensor of one sequence, and its dtype."""


class RecurrentState:
    """One mixer's states of the sequences in a batch.

    They lie in the context, ``[slots, …]``, where Megatron keeps a layer's keys and values. Zero
    before the first token. Where the context packs prompts into one row, each is a row of a batch
    for the mixer (:mod:`nemo_megacpp.mixers.prompt_pack`): :meth:`spread` before its convolution
    and its scan, :meth:`join` after them.

    Args:
        context: a :class:`SlotContext`, or Megatron's static context, whose batch has one length.
        layer_number: of the mixer's layer in the whole model.
        batch: rows of this forward pass.
        shapes: of one sequence.
        device: of the mixer.
    """

    def __init__(
        self,
        context: Any,
        layer_number: int,
        batch: int,
        shapes: Sequence[Shape],
        device: torch.device,
    ):
        memory = context.key_value_memory_dict
        if layer_number not in memory:
            slots = context.max_batch_size
            memory[layer_number] = tuple(
                torch.zeros(slots, *shape, dtype=dtype, device=device) for shape, dtype in shapes
            )
        self._memory: tuple[torch.Tensor, ...] = memory[layer_number]
        self._pack = context.pack if isinstance(context, SlotContext) else None
        if isinstance(context, SlotContext):
            self._rows = context.rows
        else:
            self._rows = slice(context.batch_size_offset, context.batch_size_offset + batch)
            if context.sequence_len_offset == 0:
                for tensor in self._memory:
                    tensor[self._rows].zero_()

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Return tokens ``[s, b, …]`` as one row of each sequence, which all end at the last."""
        return x if self._pack is None else self._pack.spread(x)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`spread`."""
        return x if self._pack is None else self._pack.join(x)

    def clear_before(self, x: torch.Tensor) -> torch.Tensor:
        """Set what :meth:`spread` puts before the sequences to zero again, in ``[b, s, c]``: a bias
        may have been added."""
        return x if self._pack is None else self._pack.clear_before(x)

    def read(self) -> tuple[torch.Tensor, ...]:
        """Return the states before this pass, ``[b, …]``."""
        return tuple(tensor[self._rows] for tensor in self._memory)

    def write(self, *states: torch.Tensor) -> None:
        """Keep the states after it."""
        for tensor, state in zip(self._memory, states, strict=True):
            tensor[self._rows] = state.to(tensor.dtype)
