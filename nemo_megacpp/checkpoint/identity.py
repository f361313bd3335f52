"""What a checkpoint says of its model, layout, data and step, beside its weights."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from typing_extensions import TypedDict

from nemo_megacpp.errors import UserError, raise_violations
from nemo_megacpp.hybrid_fields import size_violations
from nemo_megacpp.json_files import Count, Text, read_json
from nemo_megacpp.printable import cut
from nemo_megacpp.side_channels import SideChannel, read_side_channels, side_channel_violations

if TYPE_CHECKING:
    from nemo_megacpp.pattern import HybridPattern

FILE = "nemo_megacpp.json"

_LIMIT = 1 << 20
"""Most bytes of the file."""
_LARGEST = 2**53

# fmt: off
STRUCTURE = (
    "mode", "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups", "m2rnn_num_heads",
    "m2rnn_key_head_dim", "m2rnn_value_head_dim", "mamba3_mimo_rank", "mamba3_rope_fraction",
    "mamba3_output_norm", "mamba3_pairs", "mamba3_A_activation", "mamba3_A_floor",
    "m2rnn_conv_kernel", "normalization", "add_bias_linear", "add_qkv_bias", "qk_layernorm",
    "gated_linear_unit", "moe_router_enable_expert_bias", "moe_shared_expert_gate",
    "share_embeddings_and_output_weights", "ffn_hidden_size", "m2rnn_depth_state",
)
"""What decides the shape or the meaning of a saved tensor. Everything else of a model
(coefficients, clips, sequence length) may change between two runs from one checkpoint."""
# fmt: on
_READ_ONLY_BY = {
    "ffn_hidden_size": "F",
    **dict.fromkeys(
        (name for name in STRUCTURE if name.startswith("moe_") or name == "num_moe_experts"), "E"
    ),
}
"""Name in `STRUCTURE` -> the one family whose tensors depend on it. `HybridConfig` clears sizes of
experts in a model without E blocks, so a saved model may lack what its recipe has."""


class Identity(TypedDict):
    """The content of the file.

    Attributes:
        model: fields of :class:`nemo_megacpp.config.HybridConfig`.
        tokenizer: fingerprint of the tokenizer of the data; None for another kind of data.
        step: optimizer steps that the checkpoint holds.
        layout: in which it was saved.
        manifest: file name of the manifest that was written last; absent in old checkpoints, which
            have none.
    """

    model: dict[Text, Any]
    tokenizer: Text | None
    step: Count
    layout: NotRequired[Text | None]
    manifest: NotRequired[Text]


def write_identity(directory: Path, identity: Mapping[str, Any], step: int) -> None:
    """Write ``identity`` and the step into a checkpoint's folder, atomically and durably."""
    partial = directory / f"{FILE}.partial"
    with partial.open("w", encoding="utf-8") as stream:
        json.dump({**identity, "step": step}, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(directory / FILE)


def read_identity(directory: Path) -> Identity | None:
    """Return what :func:`write_identity` wrote, or None for a checkpoint from elsewhere.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    from pydantic import TypeAdapter

    path = directory / FILE
    if not path.exists():
        return None
    identity = read_json(path, TypeAdapter(Identity), _LIMIT)
    try:
        json.dumps(identity["model"], allow_nan=False)
    except ValueError:
        raise UserError(f"{path} is damaged: model holds a number that is not finite.") from None
    return identity


def saved_model(directory: Path, identity: Identity) -> tuple[dict[str, Any], HybridPattern]:
    """Return the saved model's fields, with defaults where it leaves them out, and its pattern.

    Args:
        directory: the checkpoint, for the error.
        identity: of the checkpoint.

    Raises:
        UserError: a field that shapes a tensor has a wrong type or an impossible value.
    """
    return described_model(directory / FILE, identity)


def described_model(file: Path, identity: Identity) -> tuple[dict[str, Any], HybridPattern]:
    """Return the same of an identity that another file holds; see :func:`saved_model`."""
    from nemo_megacpp.config import HybridConfig
    from nemo_megacpp.layout import ModelShape
    from nemo_megacpp.pattern import HybridPattern
    from nemo_megacpp.values import read_value

    fields: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(HybridConfig)}
    read = {*STRUCTURE, "hybrid_pattern", *(field.name for field in dataclasses.fields(ModelShape))}
    try:
        for name, value in identity["model"].items():
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise UserError(f"{name} is larger than {_LARGEST}.")
            known = name in read and name in fields
            fields[name] = read_value(HybridConfig, name, value) if known else value
        raise_violations(size_violations(fields))
        if fields["num_layers"] < 0:
            raise UserError(f"num_layers is {fields['num_layers']}.")
        pattern = HybridPattern.parse(fields["hybrid_pattern"], depth=fields["num_layers"] or None)
        raise_violations(side_channel_violations(fields["side_channels"], len(pattern)))
    except UserError as error:
        raise UserError(f"{file} is damaged: model: {error}") from None
    return fields, pattern


def validate_same_model(
    directory: Path,
    model: Mapping[str, Any],
    pattern: str,
    tokenizer: str | None,
    *,
    new_side_channels: bool = False,
) -> None:
    """Refuse to load a checkpoint whose tensors mean something else.

    Args:
        directory: the checkpoint.
        model: fields of the model that will load it; one that is left out has its default.
        pattern: its pattern, without cuts (:attr:`HybridPattern.uncut`).
        tokenizer: fingerprint of the tokenizer of its data; None if that is not known yet.
        new_side_channels: accept channels that only one of both has.

    Raises:
        UserError: listing every difference.
    """
    from nemo_megacpp.config import HybridConfig

    identity = read_identity(directory)
    if identity is None:
        return
    saved, there = saved_model(directory, identity)
    defaults = {field.name: field.default for field in dataclasses.fields(HybridConfig)}
    model = {**defaults, **model}
    saved_channels, channels = map(_channels, (saved, model))
    differences = [
        f"{name} is {cut(str(saved.get(name)))} there and {model.get(name)} here"
        for name in STRUCTURE
        if saved.get(name) != model.get(name) and _READ_ONLY_BY.get(name, "") in pattern
    ]
    if there.uncut != pattern:
        differences.append(
            f"the pattern is {cut(there.uncut, 200)} there and {cut(pattern, 200)} here"
        )
    if new_side_channels:
        saved_channels, channels = _of_both(saved_channels, channels)
    if saved_channels != channels:
        saved_names, here = (_named(each) for each in (saved_channels, channels))
        differences.append(f"the side channels are {cut(saved_names, 400)} there and {here} here")
    other = identity["tokenizer"]
    if tokenizer is not None and other is not None and other != tokenizer:
        differences.append(
            f"its data was made with another tokenizer ({other[:12]} there, {tokenizer[:12]} here)"
        )
    if differences:
        raise UserError(
            f"{directory} is a checkpoint of another model: " + "; ".join(differences) + "."
        )


def _channels(model: Mapping[str, Any]) -> tuple[SideChannel, ...]:
    """Return the side channels of a model, without what does not change their tensors: how TP holds
    them."""
    channels = read_side_channels(model.get("side_channels"))
    return tuple(dataclasses.replace(channel, partition="replicated") for channel in channels)


def _of_both(
    saved: Sequence[SideChannel], channels: Sequence[SideChannel]
) -> tuple[tuple[SideChannel, ...], tuple[SideChannel, ...]]:
    """Return both without the channels whose name only one has."""
    names = {channel.name for channel in saved} & {channel.name for channel in channels}
    first, second = (tuple(c for c in each if c.name in names) for each in (saved, channels))
    return first, second


def _named(channels: Sequence[SideChannel]) -> str:
    """Return the channels for people: what decides on their tensors, and the ids they mean."""
    return (
        ", ".join(
            f"{c.name} ({c.vocab_size} ids of {c.source}, owner {_owner(c)}, {c.combine}"
            + (f", width {c.width})" if c.width else ")")
            for c in channels
        )
        or "none"
    )


def _owner(channel: SideChannel) -> str:
    return channel.owner if isinstance(channel.owner, str) else str(list(channel.owner))
