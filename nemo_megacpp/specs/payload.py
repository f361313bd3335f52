"""What crosses a pipeline cut: the hidden states and declared extras, in one tensor.

A stage hands the next one ``[s, b, h]``. A layer that needs more from an earlier layer than the
hidden states declares it: a name, a width, and the layers between which it lives. At a cut among
them it crosses with the hidden states, token for token and in their layout (the rank's share of
``s`` under SP and CP), and its gradient comes back in the same form. What is not declared does not
cross. The declaration follows from the model's fields, so all ranks compute the same one before the
run.

Megatron's schedules assume ``[s, b, h]`` for every message. ``adjust_tensor_shapes_fn`` would tell
the 1F1B schedule another shape, but the interleaved one refuses it and Megatron's scripts do not
pass it. So there are two forms:

* Without virtual stages ``[s, b, h + widths]``, and ``config.variable_seq_lengths``: stages send
  each other the shape of a tensor before the tensor. That costs a message of 24 bytes and a
  synchronization of the device per transfer, every cut has a width of its own, and Megatron's
  scripts need no change.
* With virtual stages ``[s + rows, b, h]``, the extras laid out in whole rows behind the hidden
  states, equally many at every cut. No shapes are sent: more than two stages would wait for each
  other for ever. The schedule allocates what it receives, so whoever calls it passes
  :func:`schedule_seq_length`.

Either is turned on only where something is declared.
"""

from __future__ import annotations

import math
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
        room: numbers per token that every cut has for extras, which then lie in rows behind the
            hidden states; None: they lie beside them on the last axis.
    """

    hidden: int
    items: tuple[PayloadItem, ...] = ()
    room: int | None = None

    @property
    def width(self) -> int:
        """Numbers per token of the extras that cross."""
        return sum(item.width for item in self.items)

    def shape(self, tokens: int, batch: int) -> tuple[int, int, int]:
        """Return the shape of the message of ``batch`` rows, of which the rank has ``tokens``."""
        if self.room is None:
            return tokens, batch, self.hidden + self.width
        return tokens + -(-tokens * self.room // self.hidden), batch, self.hidden

    def pack(self, hidden: torch.Tensor, extras: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what is sent with ``hidden``, ``[s, b, h]``: that tensor itself if the message has
        no room for anything else.

        Extras that no later stage needs are left behind. One that is declared must be there.
        """
        tokens, batch, _ = hidden.shape
        shape = self.shape(tokens, batch)
        if shape == hidden.shape:
            return hidden
        tensors = [extras[item.name].to(hidden.dtype) for item in self.items]
        for item, tensor in zip(self.items, tensors, strict=True):
            assert tensor.shape == (tokens, batch, item.width), (item, tensor.shape)
        if self.room is None:
            return torch.cat([hidden, *tensors], dim=-1)
        rows = hidden.new_empty(0) if not tensors else torch.cat([t.flatten() for t in tensors])
        missing = math.prod(shape) - hidden.numel() - rows.numel()
        rows = torch.cat([rows, rows.new_zeros(missing)]).view(-1, batch, self.hidden)
        return torch.cat([hidden, rows])

    def unpack(self, packed: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the hidden states ``[s, b, h]`` and the extras by name."""
        rows, batch, width = packed.shape
        # The rows of s tokens are fewer than those of s + 1, so they tell s.
        tokens = rows if self.room is None else rows * self.hidden // (self.hidden + self.room)
        assert packed.shape == self.shape(tokens, batch), (packed.shape, self)
        widths = [item.width for item in self.items]
        if self.room is None:
            if width == self.hidden:
                return packed, {}
            hidden, *extras = packed.split([self.hidden, *widths], dim=-1)
        else:
            hidden, behind = packed.split([tokens, rows - tokens])
            sizes = [tokens * batch * each for each in widths]
            numbers = behind.flatten()
            *flat, _ = numbers.split([*sizes, numbers.numel() - sum(sizes)])
            extras = [t.view(tokens, batch, -1) for t in flat]
        # Layers may expect memory without gaps, which a part of the last axis has.
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

    With virtual stages every cut has the room of the widest place in the model.
    """
    everything = declared(letters, fields)
    room = None
    if everything and config.virtual_pipeline_model_parallel_size is not None:
        room = max(sum(i.width for i in _alive(everything, at)) for at in range(1, len(letters)))
    return StagePayload(int(config.hidden_size), _alive(everything, cut), room)


def _alive(everything: tuple[Declared, ...], cut: int) -> tuple[PayloadItem, ...]:
    return tuple(each.item for each in everything if each.first < cut <= each.last)


def sends_shapes(letters: str, fields: HybridFields, config: TransformerConfig) -> bool:
    """Return whether stages send each other the shape of a tensor before the tensor."""
    if config.variable_seq_lengths:
        return True
    return (
        bool(declared(letters, fields))
        and config.pipeline_model_parallel_size > 1
        and config.virtual_pipeline_model_parallel_size is None
    )


def schedule_seq_length(
    letters: str, fields: HybridFields, config: TransformerConfig, seq_length: int
) -> int:
    """Return the ``seq_length`` that Megatron's schedule must be called with.

    The schedule divides it by CP, and under SP by TP, and receives as many rows of ``[b, h]`` from
    another stage. It is ``seq_length`` itself in a model that declares nothing, and without virtual
    stages.

    Args:
        letters: the families of the whole model, layer by layer.
        fields: the model's hybrid fields.
        config: the model's configuration, with its layout.
        seq_length: tokens of a row.
    """
    tp = config.tensor_model_parallel_size if config.sequence_parallel else 1
    share = config.context_parallel_size * tp
    payload = payload_at(1, letters, fields, config)
    return payload.shape(seq_length // share, 1)[0] * share
