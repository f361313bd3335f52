"""The R mixer: M²RNN, a non-linear recurrent network with a matrix state (arXiv 2603.14360).

``N`` heads, key dim ``K``, value dim ``V``, state ``H ∈ R^{K×V}`` per head; one query and one key
head are shared by all heads. With ``[q | k] , [v | f̃ | g] = W_in x`` and a causal convolution with
SiLU over q, k and v::

    f_t = exp(-exp(A_log) · softplus(f̃_t + dt_bias))
    Z_t = tanh(H_{t-1} W_n + k_t v_tᵀ)
    H_t = f_t H_{t-1} + (1 - f_t) Z_t
    y_t = H_tᵀ q_t + D ⊙ v_t
    o_t = RMSNorm(vec(y) ⊙ SiLU(g))
    out = W_o · o

With ``depth_state`` an R block takes a state from the R block before it in depth, token by token,
and hands one on (zero for the first)::

    v_t ← v_t + γ ⊙ r_t           after the convolution; γ one number per head and channel
    r'_t = 1/N · Σ_n o_{t,n}      what the next R block takes, V numbers per token

Tensor parallelism splits heads. What stays whole: the q and k rows and their convolution
(replicated; gradients summed over tp) and the norm, which spans all ``N·V`` channels of a token
whatever the layout (one all-reduce of a number per token).

Initialisation is that of the authors (lm-engine): projections and convolution as
``config.init_method`` has it, ``N(0, init_method_std)``; ``W_n = I``, ``D = 1``, ``A`` uniform in
(0, 16], ``softplus(dt_bias)`` log-uniform in [0.001, 0.1].

Context parallelism has two exact forms (``m2rnn_context_parallel``): an all-to-all that spreads a
rank's heads over cp and gives each the whole sequence, or, where heads do not divide, a serial
hand-over of ``H`` from one segment of the sequence to the next.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch.nn import functional as F

from nemo_megacpp.errors import UserError
from nemo_megacpp.mixer_settings import M2RNNSettings
from nemo_megacpp.mixers.handover import receive_state, send_state
from nemo_megacpp.mixers.head_parallel import (
    HeadParallelMixer,
    MixerSubmodules,
    choose_triton,
    init_step_size_bias,
    log_once,
)
from nemo_megacpp.mixers.kernels.causal_conv1d import causal_conv1d, causal_conv1d_state
from nemo_megacpp.mixers.kernels.m2rnn_scan import m2rnn_scan
from nemo_megacpp.mixers.kernels.m2rnn_triton import m2rnn_triton, m2rnn_triton_reason
from nemo_megacpp.mixers.recompute import recomputable
from nemo_megacpp.mixers.recurrent_state import RecurrentState
from nemo_megacpp.mixers.replicated import replicated, sum_over_tp
from nemo_megacpp.mixers.sequence_layout import (
    TokenOrder,
    gather_sequence,
    heads_to_sequence,
    segments_to_zigzag,
    sequence_to_heads,
    token_order,
    zigzag_to_segments,
)

_LARGEST_DECAY_RATE = 16.0
"""``A`` is uniform between zero and this at initialisation, as in lm-engine."""


class M2RNNMixer(HeadParallelMixer):
    """M²RNN as the mixer of Megatron's ``MambaLayer``.

    Args:
        config: Megatron's model configuration.
        submodules: input and output projection.
        d_model: hidden size ``h``.
        settings: the mixer's own.
        layer_number: global number of the layer, from 1.
        pg_collection: process groups; ``tp``, ``cp`` and ``dp_cp`` are used.

    Raises:
        UserError: ``context_parallel="all_to_all"`` with heads that cp does not divide; or
            ``kernel="triton"`` where that kernel cannot run (raised here, or in the first forward
            pass if only that can tell).

    Parameters, with their type on tp (``n = N/tp`` heads per rank): ``in_proj.weight``
    ``[n·(2V+1), h]`` rows ``(v, f̃, g)`` per head, V; ``in_proj.shared_weight`` ``[2K, h]`` rows q
    and k, R; ``conv_weight`` ``[n·V, w]``, V; ``shared_conv_weight`` ``[2K, w]``, R; ``A_log``,
    ``dt_bias`` ``[n]``, V; ``D``, ``norm_weight`` ``[n·V]``, V; ``state_weight`` ``[n, V, V]``, V;
    ``out_proj.weight`` ``[h, n·V]``, V (columns); with ``depth_state`` also ``depth_gate``
    ``[n·V]``, V. ``A_log``, ``dt_bias`` and ``D`` are at least float32
    (:mod:`nemo_megacpp.mixers.float32`), as is the gate computed from them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MixerSubmodules,
        d_model: int,
        settings: M2RNNSettings,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ):
        super().__init__(config, pg_collection, layer_number)
        assert pg_collection is not None
        self.settings, self.num_heads = settings, settings.heads(d_model)
        tp = self.tp_group.size()
        assert self.num_heads % tp == 0, "the layout is validated before a model is built"
        self.heads = self.num_heads // tp
        self.k_dim, self.v_dim = settings.key_head_dim, settings.value_head_dim
        self.serial = self._cp_is_serial()
        self.spread = 1 if self.serial else self.cp_group.size()
        if settings.kernel == "triton":
            self._runs_triton(config.params_dtype)
        # A rank's backward pass runs on the mean loss of its own tokens, and DDP averages over dp
        # and cp afterwards: what flows here is that many times the gradient of the global loss.
        clip = settings.state_gradient_clip
        self.clip = None if clip is None else clip * pg_collection.dp_cp.size()

        channels, rows = self.num_heads * self.v_dim, self.num_heads * (2 * self.v_dim + 1)
        self.build_projections(submodules, d_model, rows, channels, shared_rows=2 * self.k_dim)
        n, channels = self.heads, self.heads * self.v_dim
        self.conv_weight = self.split_parameter(channels, settings.conv_kernel)
        self.shared_conv_weight = self.replicated_parameter(2 * self.k_dim, settings.conv_kernel)
        self.A_log = self.split_parameter(n, float32=True)
        self.dt_bias = self.split_parameter(n, float32=True)
        self.D = self.split_parameter(channels, fill=1.0, float32=True)
        self.state_weight = self.split_parameter(n, self.v_dim, self.v_dim)
        self.norm_weight = self.split_parameter(channels, fill=1.0)
        if settings.depth_state:
            self.depth_gate = self.split_parameter(channels)
        if config.perform_initialization:
            self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        self.config.init_method(self.shared_conv_weight)
        self.state_weight.copy_(torch.eye(self.v_dim))
        with get_cuda_rng_tracker().fork():
            self.config.init_method(self.conv_weight)
            if self.settings.depth_state:
                self.config.init_method(self.depth_gate)
            # Uniform on (0, 1]: its logarithm must exist.
            uniform = 1 - torch.rand_like(self.A_log)
            self.A_log.copy_(torch.log(_LARGEST_DECAY_RATE * uniform))
            init_step_size_bias(self.dt_bias)

    @recomputable("m2rnn")
    def forward(
        self,
        hidden_states: torch.Tensor,
        depth_state: torch.Tensor | None = None,
        *,
        hands_on: bool = False,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map ``[s, b, h]`` (``[s/tp, b, h]`` under SP) to the same shape.

        Args:
            hidden_states: the input.
            depth_state: ``[s, b, V]`` in the layout of the input, from the R block before this one;
                None for the first.
            hands_on: return the state for the next R block as well, ``[s, b, V]``.
            inference_context: holds the states of the rows' sequences, read before the tokens and
                written after them; None where a row is a whole sequence.
            packed_seq_params: the documents of the row; not read with an inference context, which
                knows them itself.

        Returns:
            The output, and the state or None: what ``MambaLayer`` takes for a bias.
        """
        shared, split = self.in_proj(hidden_states)
        if inference_context is not None:
            y = self._continue(shared, split, depth_state, inference_context)
            return self._project(y, hands_on)
        group, cp = self.cp_group, self.cp_group.size()
        order = token_order(shared.size(0) * cp, cp, packed_seq_params, shared.device)
        depth_state = self._depth_state_here(depth_state, order)
        if self.serial:
            shared, split = (zigzag_to_segments(t, group, order) for t in (shared, split))
            y = segments_to_zigzag(self._mix(shared, split, order, depth_state), group, order)
        else:
            shared = gather_sequence(shared, group, order)
            split = sequence_to_heads(split, group, order)
            y = heads_to_sequence(self._mix(shared, split, order, depth_state), group, order)
        return self._project(y, hands_on)

    def _continue(
        self,
        shared: torch.Tensor,
        split: torch.Tensor,
        depth_state: torch.Tensor | None,
        context: Any,
    ) -> torch.Tensor:
        """Mix what follows the tokens of the states in an inference context; see :meth:`_mix`."""
        memory = self._state_in(context, shared.size(1), shared.device)
        shared, split = memory.spread(shared), memory.spread(split)
        order = token_order(shared.size(0), 1, device=shared.device)
        if depth_state is not None:
            depth_state = memory.spread(self._depth_state_here(depth_state, order))
        return memory.join(self._mix(shared, split, order, depth_state, memory))

    def _project(self, y: torch.Tensor, hands_on: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output, and the state for the next R block or None."""
        normed = self._norm(y)
        output, _ = self.out_proj(normed)
        return output, self._summary(normed) if hands_on else None

    def _cp_is_serial(self) -> bool:
        cp, form = self.cp_group.size(), self.settings.context_parallel
        if cp == 1:
            return False
        if form == "all_to_all" and self.heads % cp:
            raise UserError(
                f"m2rnn_context_parallel='all_to_all' needs the heads of a tensor-parallel rank to "
                f"divide by CP: {self.num_heads} heads / TP={self.tp_group.size()} = "
                f"{self.heads}, CP={cp}. Choose 'serial' or 'auto'."
            )
        serial = self.settings.is_serial(self.heads, cp)
        exchange = "passes its state from segment to segment" if serial else "spreads its heads"
        log_once(
            f"M²RNN {exchange} over CP={cp} ({self.heads} heads per rank, "
            f"m2rnn_context_parallel={form!r})."
        )
        return serial

    def _depth_state_here(
        self, state: torch.Tensor | None, order: TokenOrder
    ) -> torch.Tensor | None:
        """Return the state of the tokens that this rank's heads mix, ``[s, b, V]``.

        Exchanged before the tokens of the mixer: in the backward pass it then comes after all of
        them, on every rank alike.
        """
        if state is None:
            return None
        if self.config.sequence_parallel:
            state = gather_from_sequence_parallel_region(state, group=self.tp_group)
        state = replicated(state, self.config, self.tp_group)
        move = zigzag_to_segments if self.serial else gather_sequence
        return move(state, self.cp_group, order)

    def _summary(self, normed: torch.Tensor) -> torch.Tensor:
        """Return the mean of the heads' outputs, ``[s, b, V]`` in the layout of the input."""
        total = normed.unflatten(-1, (-1, self.v_dim)).sum(-2) / self.num_heads
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(total, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(total, group=self.tp_group)

    def _mix(
        self,
        shared: torch.Tensor,
        split: torch.Tensor,
        order: TokenOrder,
        depth_state: torch.Tensor | None,
        memory: RecurrentState | None = None,
    ) -> torch.Tensor:
        """Convolve, recur and gate: ``[s, b, 2K]`` and ``[s, b, n·(2V+1)]`` to ``[s, b, n·V]``.

        Tokens are in order: the whole sequence, this rank's segment of it, or what follows the
        tokens in ``memory``.
        """
        window, state = (None, None) if memory is None else memory.read()
        shared, split = (t.transpose(0, 1) for t in (shared, split))  # [b, s, ·]
        v, f, g = split.unflatten(-1, (-1, 2 * self.v_dim + 1)).split(
            [self.v_dim, 1, self.v_dim], dim=-1
        )
        packs, continues = self._documents_here(order, shared.size(1))
        shared_conv = replicated(self.shared_conv_weight, self.config, self.tp_group)
        filtered = torch.cat([shared, v.flatten(-2)], dim=-1)
        taps = torch.cat([shared_conv, self.mine(self.conv_weight)])
        q, k, v = self._convolve(filtered, taps, packs, continues, window)
        if self.settings.depth_state:
            gate = self.mine(self.depth_gate).unflatten(0, (-1, self.v_dim))
            # The first R block takes zero; its gate then gets a gradient of zero, not none, which
            # Megatron's overlapped reduction would wait for.
            taken = 0 if depth_state is None else depth_state.transpose(0, 1).unsqueeze(2)
            v = v + gate * taken
        if self.serial:
            wide = torch.promote_types(v.dtype, torch.float32)
            zeros = v.new_zeros(v.size(0), v.size(2), self.k_dim, self.v_dim, dtype=wide)
            state, q = receive_state(zeros, q, self.cp_group)
            state = state * continues
        recurrence = m2rnn_triton if self._runs_triton(v.dtype, v.device) else m2rnn_scan
        y, last = recurrence(
            q,
            k,
            v,
            self._forget(f.squeeze(-1)),
            self.mine(self.state_weight),
            initial_state=state,
            seq_idx=packs,
            state_gradient_clip=self.clip,
            clip_order=self.settings.clip_order,
        )
        if memory is not None:
            memory.write(causal_conv1d_state(filtered, taps.size(1), None, window), last)
        if self.serial:
            y = send_state(last, y, self.cp_group)
        y = (y.flatten(-2) + self.mine(self.D) * v.flatten(-2)).to(v.dtype)
        return (y * F.silu(g.flatten(-2))).transpose(0, 1)

    def _runs_triton(self, dtype: torch.dtype, device: torch.device | None = None) -> bool:
        return choose_triton(
            self.settings.kernel,
            lambda: m2rnn_triton_reason(value_dim=self.v_dim, dtype=dtype, device=device),
            "M²RNN",
            "m2rnn_kernel",
            device=device,
            loop="the tokens",
            remedy="Install triton, and choose a model and a precision that the kernel supports.",
        )

    def _documents_here(self, order: TokenOrder, length: int) -> tuple[torch.Tensor | None, float]:
        """Return the documents ``[1, s]`` of this rank's tokens, and 1.0 if the first of them
        continues the document in which the previous segment ended, else 0.0."""
        if order.documents is None:
            return None, 1.0
        start = self.cp_group.rank() * length if self.serial else 0
        continues = start == 0 or start not in order.boundaries
        return order.documents[start : start + length].unsqueeze(0), float(continues)

    def _state_in(self, context: Any, batch: int, device: torch.device) -> RecurrentState:
        """Return the convolution's window and the matrix states in an inference context."""
        dtype, n = self.config.params_dtype, self.heads
        channels, taps = 2 * self.k_dim + n * self.v_dim, self.settings.conv_kernel
        shapes = [
            ((channels, taps - 1), dtype),
            ((n, self.k_dim, self.v_dim), torch.promote_types(dtype, torch.float32)),
        ]
        assert self.layer_number is not None
        return RecurrentState(context, self.layer_number, batch, shapes, device)

    def _convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        packs: torch.Tensor | None,
        continues: float,
        window: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q ``[b, s, K]``, k ``[b, s, K]`` and v ``[b, s, n, V]``, convolved."""
        packs = None if packs is None else packs.expand(x.size(0), -1)
        taps = weight.size(1)
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
        rate = F.softplus(f.to(wide) + self.mine(self.dt_bias).to(wide))
        return torch.exp(-torch.exp(self.mine(self.A_log).to(wide)) * rate)

    def _norm(self, y: torch.Tensor) -> torch.Tensor:
        """RMS norm of ``[s, b, n·V]`` over all heads' channels: mean squares are summed over tp."""
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        total = sum_over_tp(wide.square().sum(-1, keepdim=True), self.tp_group)
        mean = total / (self.num_heads * self.v_dim)
        normed = wide * torch.rsqrt(mean + self.config.layernorm_epsilon)
        return normed.to(y.dtype) * self.norm_weight
