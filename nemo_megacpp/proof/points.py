"""Where a model is watched, and how what is seen there lies in the whole.

A point is an output (or the first input) of a module. Its alignment says which part of the one-rank
tensor ``[s, b, c]`` a rank holds, so that tensors of any two layouts can be compared element by
element.

Left out, because no part of the one-rank tensor corresponds to them: the tokens dispatched to
experts and all that the routed experts compute (their order and number depend on EP, ETP and the
dispatcher; the router's probabilities and the block's output enclose them), and what a mixer
computes between its exchange of tokens for heads and the way back (functions, not modules; the
input and output projections enclose it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.mixer_settings import M2RNNSettings, Mamba3Settings
from nemo_megacpp.mixers.mamba3_rows import split_rows
from nemo_megacpp.pattern import Family


@dataclass(frozen=True)
class Alignment:
    """How ranks share a tensor ``[s, b, c]``.

    On dp the rows are varying; on cp the sequence is, in Megatron's zigzag. On tp:

    Attributes:
        scattered: under SP the tokens of a cp rank are varying; without SP all are replicated.
        split: widths in the whole of the components that lie side by side in ``c``, each varying;
            empty if every rank holds all channels.
        partial_gradient: every rank holds the same tensor for its own heads only, so the gradient
            is the sum over tp.
    """

    scattered: bool = False
    split: tuple[int, ...] = ()
    partial_gradient: bool = False


@dataclass(frozen=True)
class Point:
    """One watched tensor.

    Attributes:
        name: as parameters are named in a checkpoint, by the global index of the layer; ``:core``
            is what the output projection is given, ``:scan`` what a mixer's norm is given.
        order: sorts points by execution.
        alignment: of the tensor.
        layer: global number of the layer, from 1; None outside layers.
        family: letter of the layer, or None.
    """

    name: str
    order: tuple[int, int]
    alignment: Alignment
    layer: int | None = None
    family: str | None = None


Visit = Callable[[Point, torch.Tensor], torch.Tensor | None]

_HIDDEN = Alignment(scattered=True)
_SHARED = Alignment(partial_gradient=True)


@dataclass(frozen=True)
class _Tap:
    module: str
    alignment: Alignment
    side: Literal["output", "input"] = "output"
    index: int = 0
    suffix: str = ""


def tap(chunks: Sequence[torch.nn.Module], config: HybridConfig, visit: Visit) -> None:
    """Call ``visit(point, tensor)`` whenever a watched tensor is computed with gradients on; a
    tensor that it returns takes the place of the one computed.

    Args:
        chunks: this rank's model chunks, unwrapped.
        config: of the model.
        visit: called in the order of execution, microbatch by microbatch for each point.
    """
    for chunk in chunks:
        for point, module, where in _points(chunk, config):
            _hook(module, where, point, visit)


def _points(chunk: Any, config: HybridConfig) -> Iterator[tuple[Point, torch.nn.Module, _Tap]]:
    stack, depth = chunk.decoder, config.num_layers
    if chunk.pre_process:
        yield Point("embedding", (-1, 0), _HIDDEN), chunk.embedding, _Tap("", _HIDDEN)
    for index, family, layer in zip(stack.layer_range, stack.families, stack.layers, strict=True):
        for ordinal, where in enumerate(_taps(family, config)):
            name = ".".join(filter(None, ("decoder.layers", str(index), where.module)))
            point = Point(
                name + where.suffix, (index, ordinal), where.alignment, index + 1, family.value
            )
            yield point, layer.get_submodule(where.module), where
    if chunk.post_process:
        point = Point("decoder.final_norm", (depth, 0), _HIDDEN)
        yield point, stack.final_norm, _Tap("", _HIDDEN)
        logits = Alignment(split=(chunk.vocab_size,))
        yield Point("output_layer", (depth, 1), logits), chunk.output_layer, _Tap("", logits)


def _taps(family: Family, config: HybridConfig) -> list[_Tap]:
    """Return what is watched in a layer of ``family``, in the order of execution; of a family that
    a user added, the layer's output."""
    inside = {
        Family.ATTENTION: _attention_taps,
        Family.MAMBA: _mamba3_taps if config.mode == "mamba3" else _mamba_taps,
        Family.EXPERT: _expert_taps,
        Family.RECURRENT: _recurrent_taps,
    }
    return [*(inside[family](config) if family in inside else ()), _Tap("", _HIDDEN)]


def _attention_taps(config: HybridConfig) -> list[_Tap]:
    assert config.num_query_groups is not None and config.kv_channels is not None
    heads = config.num_attention_heads * config.kv_channels
    groups = 2 * config.num_query_groups * config.kv_channels
    return [
        _Tap("self_attention.linear_qkv", Alignment(split=(heads + groups,))),
        _Tap("self_attention.core_attention", Alignment(split=(heads,))),
        _Tap("self_attention.linear_proj", _HIDDEN),
    ]


def _projected(width: int) -> list[_Tap]:
    return [
        _Tap("mixer.out_proj", Alignment(split=(width,)), "input", suffix=":core"),
        _Tap("mixer.out_proj", _HIDDEN),
    ]


def _mamba_taps(config: HybridConfig) -> list[_Tap]:
    heads = config.mamba_num_heads or 2 * config.hidden_size // config.mamba_head_dim
    width, state = heads * config.mamba_head_dim, config.mamba_num_groups * config.mamba_state_dim
    return [
        _Tap("mixer.in_proj", Alignment(split=(width, width, state, state, heads))),
        _Tap("mixer.norm", Alignment(split=(width,)), "input", suffix=":scan"),
        *_projected(width),
    ]


def _shared_projection() -> list[_Tap]:
    """A norm of its own, and rows that are shared; the split rows lie group by group, head by
    head."""
    return [_Tap("norm", _HIDDEN), _Tap("mixer.in_proj", _SHARED, suffix=":shared")]


def _mamba3_taps(config: HybridConfig) -> list[_Tap]:
    dims = Mamba3Settings.of(config).dimensions(config)
    rows = Alignment(split=(split_rows(dims),))
    return [
        *_shared_projection(),
        _Tap("mixer.in_proj", rows, index=1),
        *_projected(dims.num_heads * dims.head_dim),
    ]


def _recurrent_taps(config: HybridConfig) -> list[_Tap]:
    settings = M2RNNSettings.of(config)
    heads, value_head_dim = settings.heads(config.hidden_size), settings.value_head_dim
    rows = Alignment(split=(heads * (2 * value_head_dim + 1),))
    return [
        *_shared_projection(),
        _Tap("mixer.in_proj", rows, index=1),
        *_projected(heads * value_head_dim),
    ]


def _expert_taps(config: HybridConfig) -> list[_Tap]:
    taps = [_Tap("pre_mlp_layernorm", _HIDDEN)]
    if width := config.moe_shared_expert_intermediate_size:
        up = Alignment(split=(width, width) if config.gated_linear_unit else (width,))
        taps += [
            _Tap("mlp.shared_experts.linear_fc1", up),
            _Tap("mlp.shared_experts", _HIDDEN),
        ]
    return [*taps, _Tap("mlp.router", _HIDDEN), _Tap("mlp", _HIDDEN)]


def _hook(module: torch.nn.Module, where: _Tap, point: Point, visit: Visit) -> None:
    def seen(values: Any) -> Any:
        """Return what replaces ``values`` (a tensor, or a tuple that holds it), None to keep."""
        if not torch.is_grad_enabled():
            return None  # a recomputed region's first pass; the second one is seen
        whole = values if isinstance(values, tuple) else (values,)
        other = visit(point, whole[where.index])
        if other is None:
            return None
        changed = (*whole[: where.index], other, *whole[where.index + 1 :])
        return changed if isinstance(values, tuple) else other

    if where.side == "input":
        module.register_forward_pre_hook(lambda _, inputs: seen(inputs))
    else:
        module.register_forward_hook(lambda _, inputs, output: seen(output))
