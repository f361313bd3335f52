"""Where the tensors inside a model are watched, how they are recorded, and how they are perturbed.

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
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.mixer_settings import M2RNNSettings, Mamba3Settings
from nemo_megacpp.mixers.mamba3_rows import split_rows
from nemo_megacpp.mixers.sequence_layout import token_order
from nemo_megacpp.pattern import Family
from nemo_megacpp.proof.gather import (
    GlobalValues,
    LocalPart,
    gather_objects,
    gather_parts,
    to_numpy,
)
from nemo_megacpp.proof.step_spec import StepSpec


@dataclass(frozen=True)
class Alignment:
    """How ranks share a tensor ``[s, b, c]``.

    On dp the rows vary; on cp the sequence does, in Megatron's zigzag. On tp:

    Attributes:
        scattered: under SP the tokens of a cp rank are split; without SP all are replicated.
        split: widths of the components that lie side by side in ``c``, each split by itself;
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


@dataclass(frozen=True)
class _Tap:
    module: str
    alignment: Alignment
    side: Literal["output", "input"] = "output"
    index: int = 0
    suffix: str = ""


def tap(chunks: Sequence[torch.nn.Module], config: HybridConfig, visit: Visit) -> None:
    """Call ``visit(point, tensor)`` whenever a watched tensor is computed with gradients on; a
    tensor that it returns replaces the one computed.

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
    """Return what is watched in a layer of ``family``, in the order of execution; in a user's
    family that is the layer's output."""
    inside = {
        Family.ATTENTION: _attention_taps,
        Family.MAMBA: _mamba3_taps if config.mode == "mamba3" else _mamba_taps,
        Family.EXPERT: _expert_taps,
        Family.RECURRENT: _recurrent_taps,
        Family.FEED_FORWARD: _feed_forward_taps,
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


def _own_mixer_taps(rows: int, width: int) -> list[_Tap]:
    """Return the taps of a mixer of ours: its own norm, and an input projection with shared rows
    beside the split ones, which lie group by group, head by head."""
    return [
        _Tap("norm", _HIDDEN),
        _Tap("mixer.in_proj", Alignment(partial_gradient=True), suffix=":shared"),
        _Tap("mixer.in_proj", Alignment(split=(rows,)), index=1),
        *_projected(width),
    ]


def _mamba_taps(config: HybridConfig) -> list[_Tap]:
    heads = config.mamba_num_heads or 2 * config.hidden_size // config.mamba_head_dim
    width, state = heads * config.mamba_head_dim, config.mamba_num_groups * config.mamba_state_dim
    return [
        _Tap("mixer.in_proj", Alignment(split=(width, width, state, state, heads))),
        _Tap("mixer.norm", Alignment(split=(width,)), "input", suffix=":scan"),
        *_projected(width),
    ]


def _mamba3_taps(config: HybridConfig) -> list[_Tap]:
    dims = Mamba3Settings.of(config).dimensions(config)
    return _own_mixer_taps(split_rows(dims), dims.num_heads * dims.head_dim)


def _recurrent_taps(config: HybridConfig) -> list[_Tap]:
    settings = M2RNNSettings.of(config)
    heads, value_head_dim = settings.heads(config.hidden_size), settings.value_head_dim
    return _own_mixer_taps(heads * (2 * value_head_dim + 1), heads * value_head_dim)


def _into_mlp(config: HybridConfig, width: int) -> Alignment:
    return Alignment(split=(width, width) if config.gated_linear_unit else (width,))


def _feed_forward_taps(config: HybridConfig) -> list[_Tap]:
    assert config.ffn_hidden_size is not None
    return [
        _Tap("mlp.linear_fc1", _into_mlp(config, config.ffn_hidden_size)),
        _Tap("mlp", _HIDDEN),
    ]


def _expert_taps(config: HybridConfig) -> list[_Tap]:
    taps = [_Tap("pre_mlp_layernorm", _HIDDEN)]
    if width := config.moe_shared_expert_intermediate_size:
        taps += [
            _Tap("mlp.shared_experts.linear_fc1", _into_mlp(config, width)),
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


@dataclass
class Trace:
    """What the watched points computed in one step, ``[s, rows, c]`` by the point's name.

    Gradients are those of the mean objective of the global batch.
    """

    points: dict[str, Point] = field(default_factory=dict)
    outputs: GlobalValues = field(default_factory=GlobalValues)
    gradients: GlobalValues = field(default_factory=GlobalValues)


class Recorder:
    """Record every watched tensor of this rank's chunks, and its gradient.

    Args:
        chunks: this rank's model chunks, unwrapped.
        config: of the model.
        spec: of the step; a single one.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], config: HybridConfig, spec: StepSpec):
        self._config, self._spec = config, spec
        self._rows = spec.micro_batch_size
        self._points: dict[str, Point] = {}
        self._seen: dict[str, int] = {}
        self._outputs: list[LocalPart] = []
        self._gradients: list[LocalPart] = []
        self._dp = parallel_state.get_data_parallel_world_size()
        self._cp = parallel_state.get_context_parallel_world_size()
        tap(chunks, config, self._visit)

    def _visit(self, point: Point, tensor: torch.Tensor) -> None:
        microbatch = self._seen.get(point.name, 0)
        self._seen[point.name] = microbatch + 1
        self._points[point.name] = point
        self._outputs.append(self._piece(point, microbatch, tensor, partial=False))

        def record(gradient: torch.Tensor) -> None:
            # Without calculate_per_token_loss, gradients are averaged over dp·cp ranks later.
            ranks = 1 if self._config.calculate_per_token_loss else self._dp * self._cp
            mean = gradient / ranks
            partial = point.alignment.partial_gradient
            self._gradients.append(self._piece(point, microbatch, mean, partial))

        if tensor.requires_grad:
            tensor.register_hook(record)

    def _piece(
        self, point: Point, microbatch: int, tensor: torch.Tensor, partial: bool
    ) -> LocalPart:
        tensor = tensor.reshape(-1, self._rows, tensor.size(-1))
        first = (microbatch * self._dp + parallel_state.get_data_parallel_rank()) * self._rows
        channels, width = _channels(point.alignment, tensor.size(-1))
        place = np.ix_(
            self._positions(point.alignment, first).numpy(),
            np.arange(first, first + self._rows),
            channels,
        )
        shape = (self._config.seq_length, self._spec.global_batch_size, width)
        return LocalPart(point.name, shape, place, to_numpy(tensor), partial)

    def _positions(self, alignment: Alignment, row: int) -> torch.Tensor:
        rank = parallel_state.get_context_parallel_rank()
        packed = None
        if documents := self._spec.documents_of(row):
            bounds = torch.tensor([0, *accumulate(documents)], dtype=torch.int32)
            packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
        held = token_order(self._config.seq_length, self._cp, packed).of_rank(rank)
        if not (alignment.scattered and self._config.sequence_parallel):
            return held
        tp = parallel_state.get_tensor_model_parallel_world_size()
        return held.chunk(tp)[parallel_state.get_tensor_model_parallel_rank()]

    def gather(self) -> Trace | None:
        """Return the trace on rank 0, None elsewhere; every rank must call."""
        everyone = gather_objects(self._points)
        outputs, gradients = gather_parts(self._outputs), gather_parts(self._gradients)
        if everyone is None or outputs is None or gradients is None:
            return None
        points = sorted(
            (point for points in everyone for point in points.values()), key=lambda p: p.order
        )
        return Trace({point.name: point for point in points}, outputs, gradients)


def _channels(alignment: Alignment, held: int) -> tuple[np.ndarray, int]:
    """Return which channels of the whole this rank's ``held`` are, and how many there are."""
    if not alignment.split:
        return np.arange(held), held
    tp = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    whole = np.split(np.arange(sum(alignment.split)), np.cumsum(alignment.split)[:-1])
    return np.concatenate([np.split(part, tp)[rank] for part in whole]), sum(alignment.split)


UNIT = 2.0**-8
"""Unit roundoff of bfloat16: eight bits of significand, so half a unit in the last place."""


def perturb(chunks: Sequence[torch.nn.Module], config: HybridConfig, seed: int) -> None:
    """Multiply every watched bfloat16 activation, and its gradient, by ``1 ± 2⁻⁸`` at random.

    Args:
        chunks: model chunks, unwrapped.
        config: of the model.
        seed: of the signs.
    """
    generator = torch.Generator().manual_seed(seed)

    def move(point: Point, tensor: torch.Tensor) -> torch.Tensor | None:
        if tensor.dtype != torch.bfloat16 or not tensor.requires_grad:
            return None  # routing probabilities are float32
        return _Move.apply(tensor, generator)

    tap(chunks, config, move)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        ctx.generator = generator
        return _moved(x, generator)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _moved(grad, ctx.generator), None


def _moved(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    sign = 2 * torch.randint(2, x.shape, generator=generator, dtype=torch.float32) - 1
    return (x.float() * (1 + UNIT * sign.to(x.device))).to(x.dtype)
