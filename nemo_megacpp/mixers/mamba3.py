"""The M mixer in mode ``mamba3``: Mamba-3, single-input (SISO) and multi-input (MIMO).

``H`` heads of ``P`` channels in ``G`` groups, state ``S ∈ R^{P×N}`` per head, ``R`` inputs and
outputs per head and token. No convolution and no ``A_log``; the scan itself is
:mod:`nemo_megacpp.mixers.kernels.mamba3`. With ``[B | C | z | x | dd_dt | dd_A | trap], θ̂ = W x``::

    Δ = softplus(dd_dt + dt_bias);  A = min(-a(dd_A), -A_floor);  λ = σ(trap)
    o = scan(x, RMS_N(B)·w_B + B_bias, RMS_N(C)·w_C + C_bias, Δ, A, λ, π·tanh(θ̂), D)
    y = Σ_r mimo_o_r ⊙ n(o_r) ⊙ SiLU(z ⊙ mimo_z_r);  out = W_o vec(y)

where ``n`` is nothing, or (``mamba3_output_norm``) an RMS norm over each head's ``P`` channels with
a weight per channel. SISO has no ``mimo_*``. Source: ``mamba_ssm/modules/mamba3.py``, 2.3.2.post1;
its norms have eps 1e-5, here they have Megatron's ``layernorm_epsilon``.

Tensor parallelism splits groups with their heads. What stays whole: the rows of θ̂ and the two
norm weights (replicated; gradients summed over tp). No sum crosses heads before ``W_o``.

Context parallelism is an all-to-all from tokens to heads and back; see
:mod:`nemo_megacpp.mixers.mamba3_rows` for what goes where.
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

from nemo_megacpp.config import NO_SETTINGS, mamba3_dimensions
from nemo_megacpp.errors import UserError
from nemo_megacpp.mixers.float32 import KeepsFloat32, keep_in_float32
from nemo_megacpp.mixers.kernels.mamba3 import mamba3_chunked
from nemo_megacpp.mixers.kernels.mamba3_gpu import mamba3_gpu, mamba3_gpu_reason
from nemo_megacpp.mixers.kernels.mamba3_state import negative_decay_rate
from nemo_megacpp.mixers.kernels.packing import accumulation_dtype
from nemo_megacpp.mixers.log import log_once
from nemo_megacpp.mixers.mamba3_rows import (
    cp_blocks,
    rank_share,
    rows_of_group_state,
    rows_per_head,
    split_rows,
)
from nemo_megacpp.mixers.replicated import mark_replicated, replicated
from nemo_megacpp.mixers.sequence_layout import (
    gather_sequence,
    heads_to_sequence,
    sequence_to_heads,
    token_order,
)
from nemo_megacpp.mixers.sharding import sharded_by_head


@dataclass
class Mamba3MixerSubmodules:
    """The linears of a Mamba-3 mixer; ``in_proj`` takes ``(in, split rows, shared rows)``."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class Mamba3Mixer(KeepsFloat32, MegatronModule):
    """Mamba-3 as the mixer of Megatron's ``MambaLayer``.

    Args:
        config: Megatron's model configuration; its ``mamba_*`` sizes, and the ``mamba3_*`` fields
            of :class:`nemo_megacpp.config.HybridConfig`.
        submodules: input and output projection.
        d_model: hidden size ``h``.
        layer_number: global number of the layer, from 1.
        pg_collection: process groups; ``tp`` and ``cp`` are used.
        settings: with a plain configuration, the ``mamba3_*`` fields not at their defaults.

    Raises:
        UserError: heads or groups do not divide by tp or cp; or ``mamba3_kernel="triton"`` where
            that kernel cannot run (here, or in the first forward pass if only that can tell).

    Parameters, with their type on tp (``n = H/tp`` heads, ``g = G/tp`` groups per rank):
    ``in_proj.weight`` ``[g·2RN + n·(2P+3), h]``, V (whole groups, see ``mamba3_rows``);
    ``in_proj.shared_weight`` ``[S, h]`` rows θ̂, R; ``dt_bias``, ``D`` ``[n]``, V; ``B_bias``,
    ``C_bias`` ``[n, R, N]``, V; ``B_norm_weight``, ``C_norm_weight`` ``[N]``, R; for MIMO
    ``mimo_x``, ``mimo_z``, ``mimo_o`` ``[n, R, P]``, V; with an output norm ``norm_weight``
    ``[n·P]``, V; ``out_proj.weight`` ``[h, n·P]``, V (columns). ``dt_bias``, ``D``, the biases and
    ``mimo_*`` are at least float32 (:mod:`nemo_megacpp.mixers.float32`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Mamba3MixerSubmodules,
        d_model: int,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        settings: Mapping[str, Any] = NO_SETTINGS,
    ):
        super().__init__(config)
        assert pg_collection is not None, "pg_collection must be provided for Mamba3Mixer"
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.dims = mamba3_dimensions(config, settings)
        self.norm_eps = config.layernorm_epsilon
        self.heads, self.groups, self.copies = rank_share(
            self.dims, self.tp_group.size(), self.cp_group.size()
        )
        if self.dims.kernel == "triton":
            self._triton_runs(config.params_dtype)

        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            split_rows(self.dims),
            self.dims.num_angles,
            config=config,
            init_method=config.init_method,
            tp_group=self.tp_group,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            self.dims.num_heads * self.dims.head_dim,
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
        config, dims, n = self.config, self.dims, self.heads
        device, rank = self.in_proj.weight.device, dims.mimo_rank

        def split(*shape: int, fill: float) -> torch.nn.Parameter:
            """As in mamba_ssm, what is not a projection or a norm is at least float32."""
            wide = torch.promote_types(config.params_dtype, torch.float32)
            parameter = torch.nn.Parameter(torch.full(shape, fill, dtype=wide, device=device))
            keep_in_float32(parameter, config)
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            return parameter

        def whole(size: int) -> torch.nn.Parameter:
            ones = torch.ones(size, dtype=config.params_dtype, device=device)
            parameter = torch.nn.Parameter(ones)
            mark_replicated(parameter, config)
            return parameter

        self.dt_bias = split(n, fill=0.0)
        self.D = split(n, fill=1.0)
        self.B_bias = split(n, rank, dims.state_dim, fill=1.0)
        self.C_bias = split(n, rank, dims.state_dim, fill=1.0)
        self.B_norm_weight, self.C_norm_weight = whole(dims.state_dim), whole(dims.state_dim)
        if rank > 1:
            self.mimo_x = split(n, rank, dims.head_dim, fill=1 / rank)
            self.mimo_z = split(n, rank, dims.head_dim, fill=1.0)
            self.mimo_o = split(n, rank, dims.head_dim, fill=1 / rank)
        if dims.output_norm:
            ones = torch.ones(n * dims.head_dim, dtype=config.params_dtype, device=device)
            self.norm_weight = torch.nn.Parameter(ones)
            set_tensor_model_parallel_attributes(self.norm_weight, True, 0, 1)
        if config.perform_initialization:
            low, high = (math.log(t) for t in dims.dt_init_range)
            with torch.no_grad(), get_cuda_rng_tracker().fork():
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
        assert inference_context is None, "the Mamba-3 mixer trains; it has no inference state"
        theta, split = self.in_proj(hidden_states)
        group, cp = self.cp_group, self.cp_group.size()
        order = token_order(theta.size(0) * cp, cp, packed_seq_params, theta.device)
        documents = order.documents
        if documents is not None:
            documents = documents.expand(theta.size(1), -1)
        theta = gather_sequence(theta, group, order)
        split = sequence_to_heads(cp_blocks(split, self.dims, self.copies), group, order)
        y = self._mix(theta.transpose(0, 1), split.transpose(0, 1), documents)
        return self.out_proj(heads_to_sequence(y.transpose(0, 1), group, order))

    def _mine(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor-parallel parameter that this cp rank's heads use.

        All cp ranks hold the parameter; the gradients of their slices meet in the sum over the
        data- and context-parallel group.
        """
        return parameter.chunk(self.cp_group.size())[self.cp_group.rank()]

    def _mix(
        self, theta: torch.Tensor, split: torch.Tensor, documents: torch.Tensor | None
    ) -> torch.Tensor:
        """Scan and gate: θ̂ ``[b, s, S]`` and this rank's blocks ``[b, s, …]`` to ``[b, s, n·P]``.

        Tokens are in order, the whole sequence; ``n`` and ``g`` are heads and groups on this cp
        rank.
        """
        dims, rank, head_dim = self.dims, self.dims.mimo_rank, self.dims.head_dim
        by_group = split.unflatten(-1, (self.groups * self.copies // self.cp_group.size(), -1))
        state_rows = rows_of_group_state(dims)
        states, heads = by_group.split([state_rows, by_group.size(-1) - state_rows], dim=-1)
        states = states.unflatten(-1, (2, rank, dims.state_dim))  # [b, s, g, 2, R, N]
        B, C = (t.transpose(2, 3) for t in states.unbind(3))
        heads = heads.unflatten(-1, (-1, rows_per_head(dims))).flatten(2, 3)
        z, x, *numbers = heads.split([head_dim, head_dim, 1, 1, 1], dim=-1)
        dd_dt, dd_A, trap = (number.squeeze(-1) for number in numbers)  # [b, s, n]
        wide = accumulation_dtype(x)
        o = self._scan(
            x,
            self._norm(B, self.B_norm_weight),
            self._norm(C, self.C_norm_weight),
            F.softplus(dd_dt.to(wide) + self._mine(self.dt_bias).to(wide)),
            negative_decay_rate(dd_A, dims.A_floor, dims.A_activation),
            trap,
            theta,
            documents,
        )
        return self._gate(o.to(wide), z.to(wide)).to(x.dtype)

    def _norm(self, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm of B or C over the state axis."""
        weight = replicated(weight, self.config, self.tp_group)
        return F.rms_norm(y, (self.dims.state_dim,), weight, self.norm_eps)

    def _scan(
        self,
        x: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        trap: torch.Tensor,
        theta: torch.Tensor,
        documents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return ``o [b, s, n, R, P]``, from the kernel that was asked for."""
        B_bias, C_bias, D = (self._mine(p) for p in (self.B_bias, self.C_bias, self.D))
        if self._triton_runs(x.dtype, documents is not None, x.device):
            return mamba3_gpu(x, B, C, B_bias, C_bias, dt, A, trap, theta, D)
        wide = accumulation_dtype(x)
        o, _ = mamba3_chunked(
            x,
            B,
            C,
            B_bias,
            C_bias,
            dt,
            A,
            torch.sigmoid(trap.to(wide)),
            math.pi * torch.tanh(theta.to(wide)),
            D,
            mimo_x=self._mine(self.mimo_x) if self.dims.mimo_rank > 1 else None,
            pairs=self.dims.pairs,
            seq_idx=documents,
        )
        return o

    def _gate(self, o: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Norm, gate and sum over r: ``o [b, s, n, R, P]`` and ``z [b, s, n, P]`` to
        ``[b, s, n·P]``."""
        z = z.unsqueeze(3)
        if self.dims.output_norm:
            weight = self._mine(self.norm_weight).to(o.dtype).view(-1, 1, self.dims.head_dim)
            o = F.rms_norm(o, (self.dims.head_dim,), eps=self.norm_eps) * weight
        if self.dims.mimo_rank == 1:
            return (o * F.silu(z)).flatten(2)
        mimo_z, mimo_o = (self._mine(p).to(o.dtype) for p in (self.mimo_z, self.mimo_o))
        return (mimo_o * o * F.silu(z * mimo_z)).sum(3).flatten(2)

    def _triton_runs(
        self, dtype: torch.dtype, packed: bool = False, device: torch.device | None = None
    ) -> bool:
        """Say whether to scan with mamba_ssm's kernel.

        Raises:
            UserError: it was asked for and cannot run.
        """
        if self.dims.kernel == "torch":
            return False
        reason = mamba3_gpu_reason(
            rank=self.dims.mimo_rank,
            head_dim=self.dims.head_dim,
            state_dim=self.dims.state_dim,
            num_angles=self.dims.num_angles,
            pairs=self.dims.pairs,
            dtype=dtype,
            packed=packed,
            device=device,
        )
        if reason is not None and self.dims.kernel == "triton":
            raise UserError(
                f"mamba3_kernel='triton' cannot be used: {reason}. Choose 'torch' or 'auto'."
            )
        log_once(
            "Using mamba_ssm's Triton kernel for Mamba-3."
            if reason is None
            else f"Using the PyTorch Mamba-3 kernel (Triton: {reason})."
        )
        return reason is None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Every split parameter is split by group and head along its first axis, so any tp can
        load it."""
        whole = ("B_norm_weight", "C_norm_weight")
        return sharded_by_head(self, whole, self.tp_group, prefix, sharded_offsets, metadata)
