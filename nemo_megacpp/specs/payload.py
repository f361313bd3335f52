"""What crosses a pipeline cut: the hidden states and declared extras, in one tensor.

A stage hands the next one ``[s, b, h]``. A layer that needs more from an earlier layer than the
hidden states declares it: a name, a width, and the layers between which it lives. At a cut among
them it lies beside the hidden states on the last axis, token for token and in their layout (the
rank's share of ``s`` under SP and CP). What crosses is ``[s, b, h + widths]``, and its gradient
comes back in the same form. What is not declared does not cross.

The declaration follows from the model's fields, so all ranks compute the same one before the run.
Megatron's schedules assume ``[s, b, h]`` for every message; ``adjust_tensor_shapes_fn`` would tell
the 1F1B schedule another shape, but the interleaved one refuses it and Megatron's scripts do not
pass it. Both schedules and both doors read ``config.variable_seq_lengths``: stages then send each
other the shape of a tensor before the tensor. That costs a message of 24 bytes and a
synchronization of the device per transfer, and lets every cut have a width of its own. It is turned
on only where something is declared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.pattern import Family

DEPTH_STATE = "m2rnn_depth_state"
SHAPE_BYTES = 3 * 8
"""The shape of a message that Megatron sends before it: three int64."""


@dataclass(frozen=True)
class PayloadItem:
    """One named extra that crosses a cut beside the hidden states.

    Attributes:
        name: such as ``m2rnn_depth_state``.
        width: numbers per token; the tensor is ``[s, b, width]`` in the pipeline's dtype and has a
            gradient.
    """

    name: str
    width: int


@dataclass(frozen=True)
class Declared:
    """An item and where it lives.

    Attributes:
        item: its name and width.
        first: the first layer that hands it on.
        last: the last layer that takes it.
    """

    item: PayloadItem
    first: int
    last: int


@dataclass(frozen=True)
class StagePayload:
    """What crosses one cut.

    Attributes:
        hidden: the model's hidden size ``h``.
        items: the extras, in the order in which they lie after the hidden states.
        padding: zeros after them.
    """

    hidden: int
    items: tuple[PayloadItem, ...] = ()
    padding: int = 0

    @property
    def width(self) -> int:
        """Numbers per token that cross the cut."""
        return self.hidden + sum(item.width for item in self.items) + self.padding

    def pack(self, hidden: torch.Tensor, extras: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return ``[s, b, width]``; ``hidden`` itself if nothing else crosses.

        Extras that no later stage needs are left behind. One that is declared must be there.
        """
        if self.width == self.hidden:
            return hidden
        tensors = [hidden, *(extras[item.name].to(hidden.dtype) for item in self.items)]
        for item, tensor in zip(self.items, tensors[1:], strict=True):
            assert tensor.shape == (*hidden.shape[:-1], item.width), (item, tensor.shape)
        tensors.append(hidden.new_zeros(*hidden.shape[:-1], self.padding))
        return torch.cat(tensors, dim=-1)

    def unpack(self, packed: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the hidden states ``[s, b, h]`` and the extras by name."""
        assert packed.size(-1) == self.width, (packed.shape, self)
        if self.width == self.hidden:
            return packed, {}
        widths = [self.hidden, *(item.width for item in self.items), self.padding]
        hidden, *extras, _ = packed.split(widths, dim=-1)
        # Layers may expect memory without gaps, which a part of the wide tensor has.
        names = (item.name for item in self.items)
        return hidden.contiguous(), dict(zip(names, extras, strict=True))


def recurrent_layers(letters: str) -> list[int]:
    """Return the global numbers of the R blocks."""
    return [i for i, letter in enumerate(letters) if letter == Family.RECURRENT.value]


def declared(letters: str, fields: HybridFields) -> tuple[Declared, ...]:
    """Return what layers hand to later layers beside the hidden states.

    R's own scan state is not among it: it ends inside its layer.

    Args:
        letters: the families of the whole model, layer by layer.
        fields: the model's hybrid fields.
    """
    layers = recurrent_layers(letters)
    if not fields.m2rnn_depth_state or len(layers) < 2:
        return ()
    item = PayloadItem(DEPTH_STATE, fields.m2rnn_value_head_dim)
    return (Declared(item, layers[0], layers[-1]),)


def payload_at(
    cut: int, letters: str, fields: HybridFields, config: TransformerConfig
) -> StagePayload:
    """Return what crosses the cut before layer ``cut``.

    Two stages with virtual stages are each other's next and previous one, and Megatron matches the
    shapes that they send by order alone: there every cut is padded to one width.
    """
    everything = declared(letters, fields)
    items = tuple(each.item for each in everything if each.first < cut <= each.last)
    one_width = (
        config.pipeline_model_parallel_size == 2
        and config.virtual_pipeline_model_parallel_size is not None
    )
    widths = sum(each.item.width for each in everything) if one_width else 0
    padding = max(0, widths - sum(item.width for item in items))
    return StagePayload(int(config.hidden_size), items, padding)
