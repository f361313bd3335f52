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
"""

from __future__ import annotations

import math
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
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch.nn import functional as F

from nemo_megacpp.config import m2rnn_dimensions
from nemo_megacpp.mixers.kernels.causal_conv1d import causal_conv1d
from nemo_megacpp.mixers.kernels.m2rnn import m2rnn_scan
from nemo_megacpp.mixers.replicated import mark_replicated, replicated, sum_over_tp
from nemo_megacpp.mixers.sequence_layout import document_ids


@dataclass
class M2RNNMixerSubmodules:
    """The linears of an M²RNN mixer; ``in_proj`` takes ``(in, split rows, shared rows)``."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class M2RNNMixer(MegatronModule):
    """M²RNN as the mixer of Megatron's ``MambaLayer``.

    Args:
        config: Megatron's model configuration; the ``m2rnn_*`` fields of
            :class:`nemo_megacpp.config.HybridConfig`, or their defaults for a plain one.
        submodules: input and output projection.
        d_model: hidden size ``h``.
        layer_number: global number of the layer, from 1.
        pg_collection: process groups; ``tp`` is used.

    Parameters, with their type on tp (``n = N/tp`` heads per rank): ``in_proj.weight``
    ``[n·(2V+1), h]`` rows ``(v, f̃, g)`` per head, V; ``in_proj.shared_weight`` ``[2K, h]`` rows q
    and k, R; ``conv_weight`` ``[n·V, w]``, V; ``shared_conv_weight`` ``[2K, w]``, R; ``A_log``,
    ``dt_bias`` ``[n]``, V; ``D``, ``norm_weight`` ``[n·V]``, V; ``state_weight`` ``[n, V, V]``, V;
    ``out_proj.weight`` ``[h, n·V]``, V (columns).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: M2RNNMixerSubmodules,
        d_model: int,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
    ):
        super().__init__(config)
        assert pg_collection is not None, "pg_collection must be provided for M2RNNMixer"
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.dims = m2rnn_dimensions(config)
        tp = self.tp_group.size()
        assert self.dims.num_heads % tp == 0, "layout.py refuses this before a model is built"
        self.heads = self.dims.num_heads // tp
        self.k_dim, self.v_dim = self.dims.key_head_dim, self.dims.value_head_dim
        self.norm_eps = config.layernorm_epsilon

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
        # Decay rates and norms lose too much in bf16 (as Mamba's do): at least float32 here.
        wide = torch.promote_types(config.params_dtype, torch.float32)

        def split(*shape: int, dtype: torch.dtype = config.params_dtype) -> torch.nn.Parameter:
            parameter = torch.nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            return parameter

        self.conv_weight = split(channels, dims.conv_kernel)
        self.shared_conv_weight = torch.nn.Parameter(
            torch.empty(2 * self.k_dim, dims.conv_kernel, dtype=config.params_dtype, device=device)
        )
        mark_replicated(self.shared_conv_weight, config)
        self.A_log = split(n, dtype=wide)
        self.dt_bias = split(n, dtype=wide)
        self.D = split(channels)
        self.state_weight = split(n, self.v_dim, self.v_dim)
        self.norm_weight = split(channels)
        if not config.perform_initialization:
            return
        bound = 1.0 / math.sqrt(dims.conv_kernel)
        with torch.no_grad():
            torch.nn.init.uniform_(self.shared_conv_weight, -bound, bound)
            torch.nn.init.ones_(self.D)
            torch.nn.init.ones_(self.norm_weight)
            self.state_weight.copy_(torch.eye(self.v_dim, device=device))
            with get_cuda_rng_tracker().fork():
                torch.nn.init.uniform_(self.conv_weight, -bound, bound)
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
        shared, split = (t.transpose(0, 1) for t in (shared, split))  # [b, s, ·]
        v, f, g = split.unflatten(-1, (self.heads, 2 * self.v_dim + 1)).split(
            [self.v_dim, 1, self.v_dim], dim=-1
        )
        packs = None
        if packed_seq_params is not None:
            packs = document_ids(packed_seq_params, shared.size(1)).unsqueeze(0)
        conv_weight = torch.cat(
            [replicated(self.shared_conv_weight, self.config, self.tp_group), self.conv_weight]
        )
        qkv = causal_conv1d(
            torch.cat([shared, v.flatten(-2)], dim=-1), conv_weight, None, "silu", seq_idx=packs
        )
        q, k, v = qkv.split([self.k_dim, self.k_dim, self.heads * self.v_dim], dim=-1)
        v = v.unflatten(-1, (self.heads, self.v_dim))
        y, _ = m2rnn_scan(
            q,
            k,
            v,
            self._forget(f.squeeze(-1)).to(v.dtype),
            self.state_weight,
            seq_idx=packs,
            state_gradient_clip=self.dims.state_gradient_clip,
            clip_order=self.dims.clip_order,
        )
        y = y.flatten(-2) + self.D * v.flatten(-2)
        y = self._norm(y * F.silu(g.flatten(-2)))
        return self.out_proj(y.transpose(0, 1).contiguous())

    def _forget(self, f: torch.Tensor) -> torch.Tensor:
        """Return the forget gate ``f_t ∈ (0, 1)``, ``[b, s, n]``."""
        wide = torch.promote_types(f.dtype, torch.float32)
        rate = F.softplus(f.to(wide) + self.dt_bias.to(wide))
        return torch.exp(-torch.exp(self.A_log.to(wide)) * rate)

    def _norm(self, y: torch.Tensor) -> torch.Tensor:
        """RMS norm over all heads' channels: the mean square is summed over tp."""
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        total = sum_over_tp(wide.square().sum(-1, keepdim=True), self.tp_group)
        mean = total / (self.dims.num_heads * self.v_dim)
        return (wide * torch.rsqrt(mean + self.norm_eps)).to(y.dtype) * self.norm_weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Every split parameter is split by head along its first axis, so any tp can load it."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        split = ("conv_weight", "A_log", "dt_bias", "D", "state_weight", "norm_weight")
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(split, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded.update(
                sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
                )
            )
        return sharded
