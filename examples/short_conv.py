"""An added block family, C: a doubly gated short convolution, split over TP, SP and CP.

Copy this file, change the maths, and name it in a recipe::

    family_modules: [examples/short_conv.py]
    pattern: CECM

With ``[B, C, x]`` for every channel from ``W_in u``, the block is ``W_out (C ⊙ conv(B ⊙ x))``;
``conv`` is causal, depthwise and four taps wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_megacpp.errors import UserError
from nemo_megacpp.families import BlockFamily, register
from nemo_megacpp.formulas.collectives import (
    Collective,
    column_parallel,
    exchange,
    row_parallel,
)
from nemo_megacpp.formulas.saved import Saved, norm
from nemo_megacpp.formulas.sizes import Sizes
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.layout.rules import Divides, LayoutCheck, LayoutViolation
from nemo_megacpp.mixers.head_parallel import HeadParallelMixer, MixerSubmodules
from nemo_megacpp.mixers.kernels.causal_conv1d import causal_conv1d
from nemo_megacpp.mixers.sequence_layout import heads_to_sequence, sequence_to_heads, token_order
from nemo_megacpp.specs.backend import mamba_layer


@dataclass(frozen=True)
class ShortConvSettings:
    """What the layer spec passes to the mixer.

    Attributes:
        taps: ``w``, inputs that the convolution reads for a token, its own included.
    """

    taps: int = 4

    def __post_init__(self) -> None:
        if self.taps < 1:
            raise UserError(f"taps={self.taps} must be at least 1.")


SETTINGS = ShortConvSettings()


class ShortConvMixer(HeadParallelMixer):
    """The mixer of Megatron's ``MambaLayer``: ``[s, b, h]`` to ``[s, b, h]``.

    Parameters, with their type on tp (``c = h/tp`` channels per rank): ``in_proj.weight``
    ``[3c, h]`` rows ``(B, C, x)`` per channel, V; ``conv_weight`` ``[c, w]``, V;
    ``out_proj.weight`` ``[h, c]``, V (columns). Nothing is replicated. Over cp a rank exchanges its
    tokens for a share of its channels, because a convolution reads tokens in order.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MixerSubmodules,
        d_model: int,
        settings: ShortConvSettings,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ):
        super().__init__(config, pg_collection, layer_number)
        self.build_projections(submodules, d_model, rows=3 * d_model, inner=d_model)
        channels = d_model // self.tp_group.size()
        # Tagged as split over tp, and saved so: any tensor-parallel size loads the checkpoint.
        self.conv_weight = self.split_parameter(channels, settings.taps)
        if config.perform_initialization:
            bound = 1 / math.sqrt(settings.taps)
            with get_cuda_rng_tracker().fork():
                torch.nn.init.uniform_(self.conv_weight, -bound, bound)

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
        weight = self.mine(self.conv_weight)
        y = causal_conv1d((b * x).transpose(0, 1), weight, seq_idx=documents).transpose(0, 1)
        return self.out_proj(heads_to_sequence(c * y, self.cp_group, order))


def short_conv_layer_spec(backend: BackendSpecProvider, fields: HybridFields) -> ModuleSpec:
    """Return a ``MambaLayer`` (norm, mixer, residual) around the mixer.

    ``fields`` are the model's hybrid fields; this family reads none of them.
    """
    mixer = ModuleSpec(
        module=ShortConvMixer,
        params={"settings": SETTINGS},
        submodules=MixerSubmodules(
            in_proj=backend.column_parallel_linear(), out_proj=backend.row_parallel_linear()
        ),
    )
    return mamba_layer(mixer, backend)


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
    padded = sizes.batch * (length + SETTINGS.taps - 1) * channels
    return [
        *norm(sizes),
        Saved("projected B, C and x", 3 * values * sizes.e),
        Saved("convolution: padded input", padded * sizes.wide),
        Saved("convolution: taps", channels * SETTINGS.taps * sizes.wide),
        Saved("convolution: output", values * sizes.e),
        Saved("output projection's input", values * sizes.e),
    ]


def mixing(sizes: Sizes) -> int:
    """Operations of the two gates and the convolution, for one token."""
    return sizes.h * (2 * SETTINGS.taps + 2)


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
