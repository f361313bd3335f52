"""Side channels: integers beside the tokens, and the declaration of who embeds them.

A model declares its channels in ``side_channels``, a list of mappings with the fields of
:class:`SideChannel`. A channel is one integer per token (the language of a document, the kind of a
byte, a hash of the last tokens). Its *owner* holds an embedding of it and brings it into the stream
``x`` ``[s, b, h]`` before it computes::

    x + Σ E_c[ids_c]                 over channels with combine: add
    x + W [x; E_c[ids_c]; …]         over channels with combine: concat, W [h, h + Σ width]

An owner is the embedding (``first``) or a layer. Each layer that owns a channel has a table of its
own, so no two pipeline stages share one, and no gradient is summed between stages. Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import Field

from nemo_megacpp.errors import UserError, collect_violations, nearest, raise_violations
from nemo_megacpp.printable import shown
from nemo_megacpp.values import read_value

BATCH_PREFIX = "side_channel."
"""A batch holds the ids of a channel under this and its name, ``[b, s]``."""
MOST = 64
"""A model has no more channels than this."""

_PLACE = "side channels "
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(frozen=True)
class SideChannel:
    """One channel.

    Attributes:
        name: lower-case letters, digits and ``_``; part of file names and checkpoint keys.
        vocab_size: ids are from 0 to this, exclusive; the table has as many rows, without padding.
        field: the JSONL field that ``data prepare`` reads the ids from.
        ngram: instead of a field, a hash of the last ``ngram`` tokens of the document
            (:func:`nemo_megacpp.data.side_channels.ngram_ids`).
        owner: ``first``: the embedding; ``all``: every layer; or numbers of layers, from 0.
        partition: ``replicated``: every tensor-parallel rank has the whole table; ``vocabulary``:
            its rows are split over TP, which must divide ``vocab_size``.
        combine: ``add`` or ``concat``, see the module.
        width: of an embedding that is concatenated; ``hidden_size`` if not given, and always for
            one that is added.
    """

    name: str
    vocab_size: Annotated[int, Field(ge=1, le=2**26)]
    field: str | None = None
    ngram: Annotated[int, Field(ge=1, le=64)] | None = None
    owner: Literal["first", "all"] | tuple[int, ...] = "first"
    partition: Literal["replicated", "vocabulary"] = "replicated"
    combine: Literal["add", "concat"] = "add"
    width: Annotated[int, Field(ge=1, le=2**20)] | None = None

    @property
    def key(self) -> str:
        """The name of its ids in a batch."""
        return BATCH_PREFIX + self.name

    @property
    def source(self) -> str:
        """What its ids are made from, as ``data prepare`` records it."""
        return f"ngram={self.ngram}" if self.ngram is not None else f"field={self.field}"

    def is_owned_by(self, layer: int | None) -> bool:
        """Whether a layer owns it, by its number from 0; None: the embedding."""
        if layer is None:
            return self.owner == "first"
        return self.owner == "all" or (not isinstance(self.owner, str) and layer in self.owner)

    def embedding_width(self, hidden_size: int) -> int:
        """Return the numbers of one embedding."""
        return self.width or hidden_size


def read_side_channels(
    declared: Sequence[Mapping[str, Any]] | None,
) -> tuple[SideChannel, ...]:
    """Read the channels of a model or of a command line.

    Raises:
        UserError: everything that is wrong with them by themselves.
    """
    messages: list[str] = []
    channels: list[SideChannel] = []
    if len(declared or ()) > MOST:
        raise UserError(f"side_channels: {len(declared or ())} channels; at most {MOST}.")
    for number, item in enumerate(declared or ()):
        with collect_violations(messages):
            channels.append(_read(item, number))
    names = [channel.name for channel in channels]
    messages += [
        f"side_channels: two channels are named {name!r}."
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    raise_violations(messages)
    return tuple(channels)


def _read(item: Mapping[str, Any], number: int) -> SideChannel:
    name = item.get("name")
    where = f"side_channels[{number}]"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"{where}.name is {shown(name)}: it must be lower-case letters, digits and '_', start "
            f"with a letter, and have at most 40 characters."
        )
    where, known = f"side channel {name}", [field.name for field in fields(SideChannel)]
    for key in item:
        if key not in known:
            raise UserError(
                f"{where} has no setting {shown(key)}.{nearest(str(key), known)} It has "
                f"{', '.join(known)}."
            )
    if "vocab_size" not in item:
        raise UserError(f"{where}: give vocab_size, the number of its ids.")
    messages: list[str] = []
    values: dict[str, Any] = {}
    for key, value in item.items():
        with collect_violations(messages):
            values[key] = read_value(SideChannel, key, value, f"{where}: {key}")
    raise_violations(messages)
    channel = SideChannel(**values)
    raise_violations(_violations(channel, where))
    return channel


def _violations(channel: SideChannel, where: str) -> Iterator[str]:
    if (channel.field is None) == (channel.ngram is None):
        yield (
            f"{where}: give either field, the JSONL field that holds its ids, or ngram, the number "
            f"of tokens to hash."
        )
    if channel.field is not None and not channel.field:
        yield f"{where}: field is empty."
    if channel.combine == "add" and channel.width is not None:
        yield (
            f"{where}: width={channel.width} with combine=add: what is added has the hidden size. "
            f"Leave width out, or set combine to concat."
        )
    if not isinstance(channel.owner, str):
        owner = list(channel.owner)
        if not owner or min(owner) < 0 or len(set(owner)) < len(owner) or owner != sorted(owner):
            yield (
                f"{where}: owner={owner} must be numbers of layers, from 0, each once, in "
                f"ascending order."
            )


def side_channel_violations(
    declared: Sequence[Mapping[str, Any]] | None, depth: int
) -> Iterator[str]:
    """Yield everything that is wrong with the channels of a model of ``depth`` layers."""
    messages: list[str] = []
    channels: tuple[SideChannel, ...] = ()
    with collect_violations(messages):
        channels = read_side_channels(declared)
    yield from messages
    for channel in channels:
        layers = () if isinstance(channel.owner, str) else channel.owner
        if missing := [layer for layer in layers if layer >= depth]:
            yield (
                f"side channel {channel.name}: owner={list(layers)} names layers {missing}, and "
                f"the model has layers 0 to {depth - 1}."
            )


def channels_at(channels: Sequence[SideChannel], layer: int | None) -> tuple[SideChannel, ...]:
    """Return the channels that a layer owns, by its number from 0; None: the embedding."""
    return tuple(channel for channel in channels if channel.is_owned_by(layer))


def channel_place(channels: Sequence[SideChannel]) -> str:
    """Return the name of the place in a plan where channels are owned together, such as ``side
    channels language+bigram``; empty for none."""
    return _PLACE + "+".join(channel.name for channel in channels) if channels else ""


def is_channel_place(place: str) -> bool:
    """Whether a place of a plan is one of side channels."""
    return place.startswith(_PLACE)


def channel_places(
    declared: Sequence[Mapping[str, Any]] | None, layers: Iterable[int | None]
) -> list[str]:
    """Return the `channel_place` of each of ``layers``, by number from 0 and None for the
    embedding; empty for one that owns no channel."""
    channels = read_side_channels(declared)
    return [channel_place(channels_at(channels, layer)) for layer in layers]


def channels_of(
    declared: Sequence[Mapping[str, Any]] | None, place: str
) -> tuple[SideChannel, ...]:
    """Return the channels of a `channel_place`."""
    known = {channel.name: channel for channel in read_side_channels(declared)}
    return tuple(known[name] for name in place.removeprefix(_PLACE).split("+"))
