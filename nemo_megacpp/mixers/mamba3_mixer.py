"""The M mixer in mode ``mamba3``: Mamba-3, single-input (SISO) and multi-input (MIMO).

``H`` heads of ``P`` channels in ``G`` groups, state ``S ∈ R^{P×N}`` per head, ``R`` inputs and
outputs per head and token. No convolution and no ``A_log``; the scan itself is
:mod:`nemo_megacpp.mixers.kernels.mamba3_scan`. With
``[B | C | z | x | dd_dt | dd_A | trap], θ̂ = W x``::

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
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from torch.nn import functional as F

from nemo_megacpp.mixer_settings import Mamba3Settings
from nemo_megacpp.mixers.head_parallel import (
    HeadParallelMixer,
    MixerSubmodules,
    choose_triton,
    init_step_size_bias,
)
from nemo_megacpp.mixers.kernels.mamba3_gpu import mamba3_gpu, mamba3_gpu_reason
from nemo_megacpp.mixers.kernels.mamba3_scan import mamba3_chunked
from nemo_megacpp.mixers.kernels.mamba3_state import (
    Mamba3State,
    mamba3_state_shapes,
    negative_decay_rate,
)
from nemo_megacpp.mixers.kernels.packing import accumulation_dtype
from nemo_megacpp.mixers.mamba3_rows import (
    cp_blocks,
    rank_share,
    rows_of_group_state,
    rows_per_head,
    split_rows,
)
from nemo_megacpp.mixers.recompute import recomputable
from nemo_megacpp.mixers.recurrent_state import RecurrentState
from nemo_megacpp.mixers.replicated import replicated
from nemo_megacpp.mixers.sequence_layout import (
    gather_sequence,
    heads_to_sequence,
    sequence_to_heads,
    token_order,
)


class Mamba3Mixer(HeadParallelMixer):
    """Mamba-3 as the mixer of Megatron's ``MambaLayer``.

    Args:
        config: Megatron's model configuration, with its ``mamba_*`` sizes.
        submodules: input and output projection.
        d_model: hidden size ``h``.
        settings: the mixer's own.
        layer_number: global number of the layer, from 1.
        pg_collection: process groups; ``tp`` and ``cp`` are used.

    Raises:
        UserError: heads or groups do not divide by tp or cp; or ``kernel="triton"`` where that
            kernel cannot run (raised here, or in the first forward pass if only that can tell).

    Parameters, with their type on tp (``n = H/tp`` heads, ``g = G/tp`` groups per rank):
    ``in_proj.weight`` ``[g·2RN + n·(2P+3), h]``, V (whole groups, see ``mamba3_rows``);
    ``in_proj.shared_weight`` ``[S, h]`` rows θ̂, R; ``dt_bias``, ``D`` ``[n]``, V; ``B_bias``,
    ``C_bias`` ``[n, R, N]``, V; ``B_norm_weight``, ``C_norm_weight`` ``[N]``, R; for MIMO
    ``mimo_x``, ``mimo_z``, ``mimo_o`` ``[n, R, P]``, V; with an output norm ``norm_weight``
    ``[n·P]``, V; ``out_proj.weight`` ``[h, n·P]``, V (columns). As in mamba_ssm, ``dt_bias``,
    ``D``, the biases and ``mimo_*`` are at least float32 (:mod:`nemo_megacpp.mixers.float32`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MixerSubmodules,
        d_model: int,
        settings: Mamba3Settings,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ):
        super().__init__(config, pg_collection, layer_number)
        self.settings, self.dims = settings, settings.dimensions(config)
        dims, rank = self.dims, self.dims.mimo_rank
        self.heads, self.groups, self.copies = rank_share(
            dims, self.tp_group.size(), self.cp_group.size()
        )
        if settings.kernel == "triton":
            self._runs_triton(config.params_dtype)

        inner = dims.num_heads * dims.head_dim
        self.build_projections(
            submodules, d_model, split_rows(dims), inner, shared_rows=dims.num_angles
        )
        split, n = self.split_parameter, self.heads
        self.dt_bias = split(n, float32=True)
        self.D = split(n, fill=1.0, float32=True)
        self.B_bias = split(n, rank, dims.state_dim, fill=1.0, float32=True)
        self.C_bias = split(n, rank, dims.state_dim, fill=1.0, float32=True)
        self.B_norm_weight = self.replicated_parameter(dims.state_dim, fill=1.0)
        self.C_norm_weight = self.replicated_parameter(dims.state_dim, fill=1.0)
        if rank > 1:
            self.mimo_x = split(n, rank, dims.head_dim, fill=1 / rank, float32=True)
            self.mimo_z = split(n, rank, dims.head_dim, fill=1.0, float32=True)
            self.mimo_o = split(n, rank, dims.head_dim, fill=1 / rank, float32=True)
        if settings.output_norm:
            self.norm_weight = split(n * dims.head_dim, fill=1.0)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork():
                init_step_size_bias(self.dt_bias)

    @recomputable("mamba")
    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: Any = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map ``[s, b, h]`` (``[s/tp, b, h]`` under SP) to the same shape, and a bias (None).

        An ``inference_context`` holds the states of the rows' sequences, read before the tokens and
        written after them.
        """
        theta, split = self.in_proj(hidden_states)
        if inference_context is not None:
            memory = self._state_in(inference_context, theta.size(1), theta.device)
            split = cp_blocks(split, self.dims, self.copies)
            theta, split = (memory.spread(t).transpose(0, 1) for t in (theta, split))
            y = self._mix(theta, split, None, memory).transpose(0, 1)
            return self.out_proj(memory.join(y))
        group, cp = self.cp_group, self.cp_group.size()
        order = token_order(theta.size(0) * cp, cp, packed_seq_params, theta.device)
        documents = order.documents
        if documents is not None:
            documents = documents.expand(theta.size(1), -1)
        theta = gather_sequence(theta, group, order)
        split = sequence_to_heads(cp_blocks(split, self.dims, self.copies), group, order)
        y = self._mix(theta.transpose(0, 1), split.transpose(0, 1), documents)
        return self.out_proj(heads_to_sequence(y.transpose(0, 1), group, order))

    def _state_in(self, context: Any, batch: int, device: torch.device) -> RecurrentState:
        """Return the parts of a :class:`Mamba3State` in an inference context."""
        dims, wide = self.dims, torch.promote_types(self.config.params_dtype, torch.float32)
        shapes = mamba3_state_shapes(dims, self.heads)
        assert self.layer_number is not None
        parts = [(shape, wide) for shape in shapes]
        return RecurrentState(context, self.layer_number, batch, parts, device)

    def _mix(
        self,
        theta: torch.Tensor,
        split: torch.Tensor,
        documents: torch.Tensor | None,
        memory: RecurrentState | None = None,
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
            F.softplus(dd_dt.to(wide) + self.mine(self.dt_bias).to(wide)),
            negative_decay_rate(dd_A, self.settings.A_floor, self.settings.A_activation),
            trap,
            theta,
            documents,
            memory,
        )
        return self._gate(o.to(wide), z.to(wide)).to(x.dtype)

    def _norm(self, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm of B or C over the state axis."""
        weight = replicated(weight, self.config, self.tp_group)
        return F.rms_norm(y, (self.dims.state_dim,), weight, self.config.layernorm_epsilon)

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
        memory: RecurrentState | None,
    ) -> torch.Tensor:
        """Return ``o [b, s, n, R, P]``, from the kernel that the settings choose; where there is a
        state, from the torch form, which takes one."""
        B_bias, C_bias, D = (self.mine(p) for p in (self.B_bias, self.C_bias, self.D))
        if memory is None and self._runs_triton(x.dtype, documents is not None, x.device):
            return mamba3_gpu(x, B, C, B_bias, C_bias, dt, A, trap, theta, D)
        wide = accumulation_dtype(x)
        o, last = mamba3_chunked(
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
            mimo_x=self.mine(self.mimo_x) if self.dims.mimo_rank > 1 else None,
            pairs=self.dims.pairs,
            initial_state=None if memory is None else Mamba3State(*memory.read()),
            seq_idx=documents,
        )
        if memory is not None:
            memory.write(*last)
        return o

    def _gate(self, o: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Norm, gate and sum over r: ``o [b, s, n, R, P]`` and ``z [b, s, n, P]`` to
        ``[b, s, n·P]``."""
        z = z.unsqueeze(3)
        if self.settings.output_norm:
            weight = self.mine(self.norm_weight).to(o.dtype).view(-1, 1, self.dims.head_dim)
            o = F.rms_norm(o, (self.dims.head_dim,), eps=self.config.layernorm_epsilon) * weight
        if self.dims.mimo_rank == 1:
            return (o * F.silu(z)).flatten(2)
        mimo_z, mimo_o = (self.mine(p).to(o.dtype) for p in (self.mimo_z, self.mimo_o))
        return (mimo_o * o * F.silu(z * mimo_z)).sum(3).flatten(2)

    def _runs_triton(
        self, dtype: torch.dtype, packed: bool = False, device: torch.device | None = None
    ) -> bool:
        return choose_triton(
            self.settings.kernel,
            lambda: mamba3_gpu_reason(self.dims, dtype=dtype, packed=packed, device=device),
            "Mamba-3",
            "mamba3_kernel",
            device=device,
            loop="chunks of the sequence",
            remedy="Install mamba-ssm 2.3 or newer, or change what the kernel needs.",
        )
