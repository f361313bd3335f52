"""An added block family, C: a doubly gated short convolution, split over TP, SP and CP.

Copy this file, change the maths, and name it in a recipe::

    family_modules: [examples/short_conv.py]
    pattern: CECM

With ``[B, C, x]`` for every channel from ``W_in u``, the block is ``W_out (C ⊙ conv(B ⊙ x))``;
``conv`` is causal, depthwise and four taps wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from nemo_megacpp.families import BlockFamily, register
from nemo_megacpp.formulas.collectives import (
    Collective,
    column_parallel,
    exchange,
    row_parallel,
)
from nemo_megacpp.formulas.saved import Saved, norm
from nemo_megacpp.formulas.sizes import Sizes
from nemo_megacpp.layout.rules import Divides, LayoutCheck, LayoutViolation
from nemo_megacpp.mixers.kernels.causal_conv1d import causal_conv1d
from nemo_megacpp.mixers.sequence_layout import heads_to_sequence, sequence_to_heads, token_order
from nemo_megacpp.mixers.sharding import sharded_by_head
from nemo_megacpp.specs.backend import mamba_layer_norm

TAPS = 4


@dataclass
class ShortConvSubmodules:
    """The two projections."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class ShortConvMixer(MegatronModule):
    """The mixer of Megatron's ``MambaLayer``: ``[s, b, h]`` to ``[s, b, h]``.

    Parameters, with their type on tp (``c = h/tp`` channels per rank): ``in_proj.weight``
    ``[3c, h]`` rows ``(B, C, x)`` per channel, V; ``conv_weight`` ``[c, w]``, V;
    ``out_proj.weight`` ``[h, c]``, V (columns). Nothing is replicated. Over cp a rank exchanges its
    tokens for a share of its channels, because a convolution wants tokens in order.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ShortConvSubmodules,
        d_model: int,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
    ):
        super().__init__(config)
        assert pg_collection is not None
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            3 * d_model,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            d_model,
            d_model,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=self.tp_group,
        )
        channels = d_model // self.tp_group.size()
        weight = torch.empty(channels, TAPS, dtype=config.params_dtype)
        self.conv_weight = torch.nn.Parameter(weight.to(self.in_proj.weight.device))
        # Says that the ranks hold different parts; without it the gradient norm counts one of them.
        set_tensor_model_parallel_attributes(self.conv_weight, True, 0, 1)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork():
                torch.nn.init.uniform_(self.conv_weight, -1 / math.sqrt(TAPS), 1 / math.sqrt(TAPS))

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: Any = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output and a bias (None); tokens are this rank's share under SP and CP."""
        assert inference_context is None, "this mixer trains; it has no inference state"
        gated, _ = self.in_proj(hidden_states)
        cp = self.cp_group.size()
        order = token_order(gated.size(0) * cp, cp, packed_seq_params, gated.device)
        # Channel by channel, so that a share of the rows is a share of the channels.
        gated = sequence_to_heads(gated, self.cp_group, order)
        b, c, x = gated.unflatten(-1, (-1, 3)).unbind(-1)
        documents = None if order.documents is None else order.documents.expand(x.size(1), -1)
        weight = self.conv_weight.chunk(cp)[self.cp_group.rank()]
        y = causal_conv1d((b * x).transpose(0, 1), weight, seq_idx=documents).transpose(0, 1)
        return self.out_proj(heads_to_sequence(c * y, self.cp_group, order))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """All parameters are split along whole channels: any tp can load them."""
        return sharded_by_head(self, (), self.tp_group, prefix, sharded_offsets, metadata)


def short_conv_layer_spec(backend: BackendSpecProvider, settings: Mapping[str, Any]) -> ModuleSpec:
    """Return a ``MambaLayer`` (norm, mixer, residual) around the mixer."""
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=mamba_layer_norm(backend),
            mixer=ModuleSpec(
                module=ShortConvMixer,
                submodules=ShortConvSubmodules(
                    in_proj=backend.column_parallel_linear(),
                    out_proj=backend.row_parallel_linear(),
                ),
            ),
            mamba_bda=get_bias_dropout_add,
        ),
    )


WHY = "each rank of a C block holds whole channels"


def channels_over_tp_and_cp(check: LayoutCheck) -> Iterator[LayoutViolation]:
    """CP shares out the channels that TP left to a rank; `Divides` looks at one degree only."""
    width, tp, cp = check.shape.hidden_size, check.layout.tp, check.layout.cp
    if cp > 1 and width % (tp * cp):
        message = f"hidden_size = {width} is not divisible by TP x CP = {tp * cp}: {WHY}."
        yield LayoutViolation("CP", "short-conv-channels-cp", message, knobs=("cp", "tp"))


def collectives(sizes: Sizes) -> list[Collective]:
    """What a layer sends in one microbatch: into and out of TP, and over cp to whole channels."""
    width = sizes.h // sizes.layout.tp
    return [
        *column_parallel(sizes, "normed hidden states"),
        *exchange(sizes, 3 * width, "B, C and x"),
        *exchange(sizes, width, "gated output"),
        *row_parallel(sizes, "mixer output"),
    ]


def saved_activations(sizes: Sizes) -> list[Saved]:
    """What autograd saves of one microbatch, in the plain torch form, on any machine."""
    channels = sizes.h // sizes.layout.tp // sizes.layout.cp
    length = sizes.length * sizes.layout.cp
    values = sizes.batch * length * channels
    padded = sizes.batch * (length + TAPS - 1) * channels
    return [
        *norm(sizes),
        Saved("projected B, C and x", 3 * values * sizes.e),
        Saved("convolution: padded input", padded * sizes.wide),
        Saved("convolution: taps", channels * TAPS * sizes.wide),
        Saved("convolution: output", values * sizes.e),
        Saved("output projection's input", values * sizes.e),
    ]


def mixing(sizes: Sizes) -> int:
    """Operations of the two gates and the convolution, for one token."""
    return sizes.h * (2 * TAPS + 2)


register(
    BlockFamily(
        letter="C",
        name="short convolution",
        layer_spec=short_conv_layer_spec,
        rules=(
            Divides("short-conv-channels", "hidden_size", "tp", WHY),
            channels_over_tp_and_cp,
        ),
        collectives=collectives,
        saved_activations=saved_activations,
        mixing=mixing,
    )
)
