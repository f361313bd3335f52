"""The R mixer: M²RNN, a non-linear recurrent network with a matrix state (arXiv 2603.14360).

``N`` heads, key dim ``K``, value dim ``V``, state ``H ∈ R^{K×V}`` per head; one query and one key
head are shared by all heads. With ``[q | k] , [v | f̃ | g] = W_in x`` and a causal convolution with
SiLU over q, k and v::

    f_t = exp(-exp(A_log) · softplus(f̃_t + dt_bias))
    Z_t = tanh(H_{t-1} W_n + k_t v_tᵀ)
    H_t = f_t H_{t-1} + (1 - f_t) Z_t
    y_t = H_tᵀ q_t + D ⊙ v_t
    out = W_o · RMSNorm(vec(y) ⊙ SiLU(g))

Tensor parallelism splits heads. What stays whole: the q and k rows and their convolution
(replicated; gradients summed over tp) and the norm, which spans all ``N·V`` channels of a token
whatever the layout (one all-reduce of a number per token).

Initialisation is that of the authors (lm-engine): projections and convolution as
``config.init_method`` has it, ``N(0, init_method_std)``; ``W_n = I``, ``D = 1``, ``A`` and
``softplus(dt_bias)`` as :class:`nemo_megacpp.config.M2RNNDimensions` says.

Context parallelism has two exact forms (``m2rnn_context_parallel``): an all-to-all that spreads a
rank's heads over cp and gives each the whole sequence, or, where heads do not divide, a serial
hand-over of ``H`` from one segment of the sequence to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch.nn import functional as F

from nemo_megacpp.config import NO_SETTINGS, m2rnn_dimensions
from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.float32 import KeepsFloat32, keep_in_float32
from nemo_megacpp.mixers.handover import receive_state, send_state
from nemo_megacpp.mixers.kernels.causal_conv1d import causal_conv1d, causal_conv1d_state
from nemo_megacpp.mixers.kernels.m2rnn import m2rnn_scan
from nemo_megacpp.mixers.kernels.m2rnn_triton import m2rnn_triton, m2rnn_triton_reason
from nemo_megacpp.mixers.log import log_once
from nemo_megacpp.mixers.replicated import mark_replicated, replicated, sum_over_tp
from nemo_megacpp.mixers.sequence_layout import (
    TokenOrder,
    gather_sequence,
    heads_to_sequence,
    segments_to_zigzag,
    sequence_to_heads,
    token_order,
    zigzag_to_segments,
)
from nemo_megacpp.mixers.sharding import sharded_by_head


@dataclass
class M2RNNMixerSubmodules:
    """The linears of an M²RNN mixer; ``in_proj`` takes ``(in, split rows, shared rows)``."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class M2RNNMixer(KeepsFloat32, MegatronModule):
    """M²RNN as the mixer of Megatron's ``MambaLayer``.

    Args:
        config: Megatron's model configuration; the ``m2rnn_*`` fields of
            :class:`nemo_megacpp.config.HybridConfig`.
        submodules: input and output projection.
        d_model: hidden size ``h``.
        layer_number: global number of the layer, from 1.
        pg_collection: process groups; ``tp``, ``cp`` and ``dp_cp`` are used.
        settings: with a plain configuration, the ``m2rnn_*`` fields not at their defaults.

    Raises:
        UserError: ``m2rnn_context_parallel="all_to_all"`` with heads that do not divide by cp; or
            ``m2rnn_kernel="triton"`` where those kernels cannot run (here, or in the first forward
            pass if only that can tell).

    Parameters, with their type on tp (``n = N/tp`` heads per rank): ``in_proj.weight``
    ``[n·(2V+1), h]`` rows ``(v, f̃, g)`` per head, V; ``in_proj.shared_weight`` ``[2K, h]`` rows q
    and k, R; ``conv_weight`` ``[n·V, w]``, V; ``shared_conv_weight`` ``[2K, w]``, R; ``A_log``,
    ``dt_bias`` ``[n]``, V; ``D``, ``norm_weight`` ``[n·V]``, V; ``state_weight`` ``[n, V, V]``, V;
    ``out_proj.weight`` ``[h, n·V]``, V (columns). ``A_log``, ``dt_bias`` and ``D`` are at least
    float32 (:mod:`nemo_megacpp.mixers.float32`), as is the gate computed from them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: M2RNNMixerSubmodules,
        d_model: int,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        settings: Mapping[str, Any] = NO_SETTINGS,
    ):
        super().__init__(config)
        assert pg_collection is not None, "pg_collection must be provided for M2RNNMixer"
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.dims = m2rnn_dimensions(config, settings)
        tp = self.tp_group.size()
        assert self.dims.num_heads % tp == 0, "layout.py refuses this before a model is built"
        self.heads = self.dims.num_heads // tp
        self.k_dim, self.v_dim = self.dims.key_head_dim, self.dims.value_head_dim
        self.norm_eps = config.layernorm_epsilon
        self.serial = self._cp_is_serial()
        if self.dims.kernel == "triton":
            self._triton_runs(config.params_dtype)
        # A rank's backward pass runs on the mean loss of its own tokens, and DDP averages over dp
        # and cp afterwards: what flows here is that many times the gradient of the global loss.
        clip = self.dims.state_gradient_clip
        self.clip = None if clip is None else clip * pg_collection.dp_cp.size()

        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            self.dims.num_heads * (2 * self.v_dim + 1),
            2 * self.k_dim,
            config=config,
            init_method=config.init_method,
            tp_group=self.tp_group,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            self.dims.num_heads * self.v_dim,
            d_model,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=self.tp_group,
        )
        self._build_parameters()

    def _build_parameters(self) -> None:
        config, dims = self.config, self.dims
        device = self.in_proj.weight.device
        n, channels = self.heads, self.heads * self.v_dim

        def split(*shape: int) -> torch.nn.Parameter:
            empty = torch.empty(*shape, dtype=config.params_dtype, device=device)
            parameter = torch.nn.Parameter(empty)
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            return parameter

        self.conv_weight = split(channels, dims.conv_kernel)
        self.shared_conv_weight = torch.nn.Parameter(
            torch.empty(2 * self.k_dim, dims.conv_kernel, dtype=config.params_dtype, device=device)
        )
        mark_replicated(self.shared_conv_weight, config)
        self.A_log, self.dt_bias, self.D = split(n), split(n), split(channels)
        for parameter in (self.A_log, self.dt_bias, self.D):
            keep_in_float32(parameter, config)
        self.state_weight = split(n, self.v_dim, self.v_dim)
        self.norm_weight = split(channels)
        if not config.perform_initialization:
            return
        with torch.no_grad():
            config.init_method(self.shared_conv_weight)
            torch.nn.init.ones_(self.D)
            torch.nn.init.ones_(self.norm_weight)
            self.state_weight.copy_(torch.eye(self.v_dim, device=device))
            with get_cuda_rng_tracker().fork():
                config.init_method(self.conv_weight)
                low, high = dims.a_init_range
                # A uniform on (low, high]: its logarithm must exist when low is zero.
                self.A_log.copy_(torch.log(high - (high - low) * torch.rand_like(self.A_log)))
                low, high = (math.log(t) for t in dims.dt_init_range)
                dt = torch.exp(low + (high - low) * torch.rand_like(self.dt_bias))
                self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus⁻¹(dt)

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: Any = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map ``[s, b, h]`` (``[s/tp, b, h]`` under SP) to the same shape, and a bias (None)."""
        assert inference_context is None, "the R mixer trains; it has no inference state"
        shared, split = self.in_proj(hidden_states)
        group, cp = self.cp_group, self.cp_group.size()
        order = token_order(shared.size(0) * cp, cp, packed_seq_params, shared.device)
        if self.serial:
            shared, split = (zigzag_to_segments(t, group, order) for t in (shared, split))
            y = segments_to_zigzag(self._mix(shared, split, order), group, order)
        else:
            shared = gather_sequence(shared, group, order)
            split = sequence_to_heads(split, group, order)
            y = heads_to_sequence(self._mix(shared, split, order), group, order)
        return self.out_proj(self._norm(y))

    def _cp_is_serial(self) -> bool:
        cp, asked = self.cp_group.size(), self.dims.context_parallel
        if cp == 1:
            return False
        if asked == "all_to_all" and self.heads % cp:
            raise UserError(
                f"m2rnn_context_parallel='all_to_all' needs the heads of a tensor-parallel rank to "
                f"divide by CP: {self.dims.num_heads} heads / TP={self.tp_group.size()} = "
                f"{self.heads}, CP={cp}. Choose 'serial' or 'auto'."
            )
        serial = asked == "serial" or self.heads % cp != 0
        form = "hands its state from segment to segment" if serial else "spreads its heads"
        log_once(f"R {form} over CP={cp} ({self.heads} heads a rank, asked for {asked!r})")
        return serial

    def _mine(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor-parallel parameter that this cp rank's heads use.

        With heads spread over cp, each rank uses its slice of a parameter that all hold; the
        gradients of the slices meet in the sum over the data- and context-parallel group.
        """
        cp = 1 if self.serial else self.cp_group.size()
        return parameter.chunk(cp)[self.cp_group.rank()] if cp > 1 else parameter

    def _mix(self, shared: torch.Tensor, split: torch.Tensor, order: TokenOrder) -> torch.Tensor:
        """Convolve, recur and gate: ``[s, b, 2K]`` and ``[s, b, n·(2V+1)]`` to ``[s, b, n·V]``.

        Tokens are in order: the whole sequence, or this rank's segment of it.
        """
        shared, split = (t.transpose(0, 1) for t in (shared, split))  # [b, s, ·]
        v, f, g = split.unflatten(-1, (-1, 2 * self.v_dim + 1)).split(
            [self.v_dim, 1, self.v_dim], dim=-1
        )
        packs, continues = self._documents_here(order, shared.size(1))
        shared_conv = replicated(self.shared_conv_weight, self.config, self.tp_group)
        q, k, v = self._convolve(
            torch.cat([shared, v.flatten(-2)], dim=-1),
            torch.cat([shared_conv, self._mine(self.conv_weight)]),
            packs,
            continues,
        )
        wide = torch.promote_types(v.dtype, torch.float32)
        state = None
        if self.serial:
            zeros = v.new_zeros(v.size(0), v.size(2), self.k_dim, self.v_dim, dtype=wide)
            state, q = receive_state(zeros, q, self.cp_group)
            state = state * continues
        recurrence = m2rnn_triton if self._triton_runs(v.dtype, v.device) else m2rnn_scan
        y, last = recurrence(
            q,
            k,
            v,
            self._forget(f.squeeze(-1)),
            self._mine(self.state_weight),
            initial_state=state,
            seq_idx=packs,
            state_gradient_clip=self.clip,
            clip_order=self.dims.clip_order,
        )
        if self.serial:
            y = send_state(last, y, self.cp_group)
        y = (y.flatten(-2) + self._mine(self.D) * v.flatten(-2)).to(v.dtype)
        return (y * F.silu(g.flatten(-2))).transpose(0, 1)

    def _triton_runs(self, dtype: torch.dtype, device: torch.device | None = None) -> bool:
        """Say whether the recurrence runs in our Triton kernels.

        Raises:
            UserError: they were asked for and cannot run.
        """
        if self.dims.kernel == "torch":
            return False
        reason = m2rnn_triton_reason(value_dim=self.v_dim, dtype=dtype, device=device)
        if reason is not None and self.dims.kernel == "triton":
            raise UserError(
                f"m2rnn_kernel='triton' cannot be used: {reason}. Choose 'torch' or 'auto'."
            )
        log_once(
            "Using the Triton M²RNN kernel."
            if reason is None
            else f"Using the PyTorch M²RNN kernel (Triton: {reason})."
        )
        return reason is None

    def _documents_here(self, order: TokenOrder, length: int) -> tuple[torch.Tensor | None, float]:
        """Return the documents ``[1, s]`` of the tokens at hand, and whether (1.0 or 0.0) the first
        of them goes on with the document that the previous segment ended in."""
        if order.documents is None:
            return None, 1.0
        start = self.cp_group.rank() * length if self.serial else 0
        continues = start == 0 or start not in order.boundaries
        return order.documents[start : start + length].unsqueeze(0), float(continues)

    def _convolve(
        self, x: torch.Tensor, weight: torch.Tensor, packs: torch.Tensor | None, continues: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q ``[b, s, K]``, k ``[b, s, K]`` and v ``[b, s, n, V]``, convolved."""
        packs = None if packs is None else packs.expand(x.size(0), -1)
        window, taps = None, weight.size(1)
        if self.serial and taps > 1:
            zeros = x.new_zeros(x.size(0), x.size(2), taps - 1)
            window, x = receive_state(zeros, x, self.cp_group)
            window = window * continues
            x = send_state(causal_conv1d_state(x, taps, packs, window), x, self.cp_group)
        qkv = causal_conv1d(x, weight, None, "silu", seq_idx=packs, initial_state=window)
        q, k, v = qkv.split([self.k_dim, self.k_dim, qkv.size(-1) - 2 * self.k_dim], dim=-1)
        return q, k, v.unflatten(-1, (-1, self.v_dim))

    def _forget(self, f: torch.Tensor) -> torch.Tensor:
        """Return the forget gate ``f_t ∈ (0, 1)``, ``[b, s, n]``, in at least float32."""
        wide = torch.promote_types(f.dtype, torch.float32)
        rate = F.softplus(f.to(wide) + self._mine(self.dt_bias).to(wide))
        return torch.exp(-torch.exp(self._mine(self.A_log).to(wide)) * rate)

    def _norm(self, y: torch.Tensor) -> torch.Tensor:
        """RMS norm of ``[s, b, n·V]`` over all heads' channels: mean squares are summed over tp."""
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        total = sum_over_tp(wide.square().sum(-1, keepdim=True), self.tp_group)
        mean = total / (self.dims.num_heads * self.v_dim)
        return (wide * torch.rsqrt(mean + self.norm_eps)).to(y.dtype) * self.norm_weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Every split parameter is split by head along its first axis, so any tp can load it."""
        whole = ("shared_conv_weight",)
        return sharded_by_head(self, whole, self.tp_group, prefix, sharded_offsets, metadata)
