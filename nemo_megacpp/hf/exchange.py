"""Tensors of a checkpoint and those of another format that hold the same numbers.

A format is a list of :class:`Exchange`: each takes some tensors of the checkpoint, by the model's
own names, and gives some of the format, and back. No value is computed either way, only rows are
joined, split and reordered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_megacpp.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_megacpp.config import HybridConfig

Move = Callable[[Sequence["Tensor"]], Sequence["Tensor"]]

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_norm.weight"

_WIDE = {
    *("A_log", "dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"),
    "expert_bias",
}
"""Last parts of the names of tensors that stay at least float32 in a model of a narrower dtype."""


@dataclass(frozen=True)
class Exchange:
    """Some tensors of a checkpoint, and the tensors of another format that hold the same.

    Attributes:
        ours: names in the checkpoint, without a wrapper's prefix.
        theirs: names in the format.
        there: makes theirs of ours.
        back: makes ours of theirs.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    there: Move
    back: Move


def same(ours: str, theirs: str | None = None) -> Exchange:
    """One tensor, as it is."""
    return Exchange((ours,), (theirs or ours,), list, list)


def joined(ours: Sequence[str], theirs: str, rows: Sequence[int]) -> Exchange:
    """Tensors of so many ``rows`` each, joined along the first axis."""

    def there(parts: Sequence[Tensor]) -> list[Tensor]:
        import torch

        return [torch.cat(list(parts))]

    def back(whole: Sequence[Tensor]) -> list[Tensor]:
        if len(whole[0]) != sum(rows):
            raise UserError(f"{theirs} has {len(whole[0])} rows in place of {sum(rows)}.")
        return [part.contiguous() for part in whole[0].split(list(rows))]

    return Exchange(tuple(ours), (theirs,), there, back)


def stays_wide(name: str) -> bool:
    """Whether a tensor is at least float32 in a model of a narrower dtype."""
    return name.rpartition(".")[2] in _WIDE


def mamba2_exchanges(config: HybridConfig, ours: str, theirs: str) -> Iterator[Exchange]:
    """Yield those of a Mamba-2 mixer, but for the norm in front of it.

    Args:
        config: of the model.
        ours, theirs: prefixes of the names, with the dot.
    """
    inner = mamba_heads(config) * config.mamba_head_dim
    states = config.mamba_num_groups * config.mamba_state_dim
    rows = {"z": inner, "x": inner, "B": states, "C": states, "dt": mamba_heads(config)}
    for name, parts in (
        ("in_proj.weight", "z x B C dt"),
        ("conv1d.weight", "x B C"),
        ("conv1d.bias", "x B C"),
    ):
        kinds = parts.split()
        names = [f"{ours}{name}.{kind}" for kind in kinds]
        yield joined(names, f"{theirs}{name}", [rows[kind] for kind in kinds])
    for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight"):
        yield same(f"{ours}{name}", f"{theirs}{name}")


def mamba_heads(config: HybridConfig) -> int:
    """Heads of an M block; without ``mamba_num_heads`` it is twice the hidden size wide."""
    return int(config.mamba_num_heads or 2 * config.hidden_size // config.mamba_head_dim)


def layer_exchanges(config: HybridConfig, number: int, letter: str) -> Iterator[Exchange]:
    """Yield those of one layer, under the checkpoint's own names."""
    layer = f"decoder.layers.{number}."
    if letter == "M" and config.mode == "nemo_native":
        yield same(f"{layer}mixer.in_proj.layer_norm_weight")
        yield from mamba2_exchanges(config, f"{layer}mixer.", f"{layer}mixer.")
        return
    names = {
        "A": _attention_names,
        "F": _mlp_names,
        "E": _expert_names,
        "M": _mamba3_names,
        "R": _m2rnn_names,
    }[letter](config)
    for name in names:
        yield same(layer + name)


def _attention_names(config: HybridConfig) -> Iterator[str]:
    yield from ("self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight")
    if config.add_bias_linear or config.add_qkv_bias:
        yield "self_attention.linear_qkv.bias"
    yield "self_attention.linear_proj.weight"
    if config.add_bias_linear:
        yield "self_attention.linear_proj.bias"


def _mlp_names(config: HybridConfig) -> Iterator[str]:
    yield from ("mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight")
    yield "mlp.linear_fc2.weight"
    if config.add_bias_linear:
        yield from ("mlp.linear_fc1.bias", "mlp.linear_fc2.bias")


def _expert_names(config: HybridConfig) -> Iterator[str]:
    yield from ("pre_mlp_layernorm.weight", "mlp.router.weight")
    if config.moe_router_enable_expert_bias:
        yield "mlp.router.expert_bias"
    yield from (f"mlp.experts.experts.linear_fc{each}.weight" for each in (1, 2))
    if config.moe_shared_expert_intermediate_size:
        yield from (f"mlp.shared_experts.linear_fc{each}.weight" for each in (1, 2))
        if config.moe_shared_expert_gate:
            yield "mlp.shared_experts.gate_weight"


def _mamba3_names(config: HybridConfig) -> Iterator[str]:
    yield "norm.weight"
    yield from (f"mixer.{each}.weight" for each in ("in_proj", "out_proj"))
    yield from ("mixer.in_proj.shared_weight", "mixer.dt_bias", "mixer.D")
    yield from (f"mixer.{each}" for each in ("B_bias", "C_bias", "B_norm_weight", "C_norm_weight"))
    if config.mamba3_mimo_rank > 1:
        yield from (f"mixer.mimo_{each}" for each in "xzo")
    if config.mamba3_output_norm:
        yield "mixer.norm_weight"


def _m2rnn_names(config: HybridConfig) -> Iterator[str]:
    yield "norm.weight"
    yield from (f"mixer.{each}.weight" for each in ("in_proj", "out_proj"))
    yield from ("mixer.in_proj.shared_weight", "mixer.conv_weight", "mixer.shared_conv_weight")
    yield from (f"mixer.{each}" for each in ("A_log", "dt_bias", "D", "state_weight"))
    yield "mixer.norm_weight"
    if config.m2rnn_depth_state:
        yield "mixer.depth_gate"


def exchanges(config: HybridConfig) -> list[Exchange]:
    """Return those of the form with modelling code: the checkpoint's names, the packed rows of
    Mamba-2 joined."""
    found = [same(EMBEDDING)]
    for number, letter in enumerate(config.pattern.letters):
        found += layer_exchanges(config, number, letter)
    found.append(same(FINAL_NORM))
    if not config.share_embeddings_and_output_weights:
        found.append(same(HEAD))
    return found
