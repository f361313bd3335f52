"""Sizes and settings of our own mixers, and what they may be. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_megacpp.errors import UserError

ClipOrder = Literal["before_output", "after_output"]
SequenceExchange = Literal["auto", "all_to_all", "serial"]
AActivation = Literal["softplus", "heavy_tail"]
Pairs = Literal["interleaved", "halves"]
Kernel = Literal["auto", "torch", "triton"]


@dataclass(frozen=True)
class M2RNNDimensions:
    """Sizes and settings of the R mixer (arXiv 2603.14360; defaults are the authors').

    Attributes:
        num_heads: ``N``.
        key_head_dim: ``K``, rows of a head's state.
        value_head_dim: ``V``, columns of a head's state.
        conv_kernel: taps of the causal convolution over q, k and v.
        state_gradient_clip: elementwise bound on the carried gradient ``dH`` of the mean loss of
            the global batch, so that it binds alike in every layout; None for no bound.
        clip_order: clip the carried ``dH`` before or after ``q_t dy_tᵀ`` is added to it.
        context_parallel: how CP splits the recurrence. ``all_to_all`` spreads heads over cp,
            ``serial`` hands the state from segment to segment; ``auto`` is ``all_to_all`` where
            the heads of a tensor-parallel rank divide by cp, else ``serial``.
        kernel: ``torch``, ``triton`` (our Triton kernels; refused where they cannot run), or
            ``auto``: ``triton`` where it can run.
        a_init_range: range of ``A`` at initialisation.
        dt_init_range: range of ``softplus(dt_bias)`` at initialisation (log-uniform).

    Raises:
        UserError: a size or setting is illegal.
    """

    num_heads: int
    key_head_dim: int = 64
    value_head_dim: int = 16
    conv_kernel: int = 4
    state_gradient_clip: float | None = 1.0
    clip_order: ClipOrder = "before_output"
    context_parallel: SequenceExchange = "auto"
    kernel: Kernel = "auto"
    a_init_range: tuple[float, float] = (0.0, 16.0)
    dt_init_range: tuple[float, float] = (1e-3, 0.1)

    def __post_init__(self) -> None:
        for name in ("num_heads", "key_head_dim", "value_head_dim", "conv_kernel"):
            if getattr(self, name) < 1:
                raise UserError(f"m2rnn_{name}={getattr(self, name)} must be at least 1.")
        clip = self.state_gradient_clip
        if clip is not None and not clip > 0:
            raise UserError(
                f"m2rnn_state_gradient_clip={clip} must be above 0, or null for no bound."
            )


@dataclass(frozen=True)
class Mamba3Dimensions:
    """Sizes and settings of the M mixer in mode ``mamba3`` (defaults are mamba_ssm 2.3.2's).

    Attributes:
        num_heads: ``H``.
        head_dim: ``P``, rows of a head's state.
        state_dim: ``N``, columns of a head's state; even.
        num_groups: ``G``; the ``H/G`` heads of a group share B and C.
        mimo_rank: ``R``, inputs and outputs per head and token; 1 is SISO.
        rope_fraction: share of the state that rotates, in (0, 1].
        A_activation: ``a`` in ``A = min(-a(dd_A), -A_floor)``.
        A_floor: slowest decay rate, above 0.
        pairs: which state channels rotate together, ``(2i, 2i+1)`` or ``(i, i + N/2)``.
        output_norm: RMS norm of each head's ``P`` outputs before the gate.
        kernel: ``torch``, ``triton`` (mamba_ssm's SISO kernel; refused where it cannot run), or
            ``auto``: ``triton`` where it can run.
        dt_init_range: range of ``softplus(dt_bias)`` at initialisation (log-uniform).

    Raises:
        UserError: a size or setting is illegal.
    """

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    mimo_rank: int = 1
    rope_fraction: float = 0.5
    A_activation: AActivation = "softplus"
    A_floor: float = 1e-4
    pairs: Pairs = "interleaved"
    output_norm: bool = False
    kernel: Kernel = "auto"
    dt_init_range: tuple[float, float] = (1e-3, 0.1)

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_dim", "state_dim", "num_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"mamba_{name}={getattr(self, name)} must be at least 1.")
        if self.num_heads % self.num_groups:
            raise UserError(
                f"mamba_num_heads={self.num_heads} is not a multiple of "
                f"mamba_num_groups={self.num_groups}."
            )
        if self.mimo_rank < 1:
            raise UserError(f"mamba3_mimo_rank={self.mimo_rank} must be at least 1; 1 is SISO.")
        if not self.A_floor > 0:
            raise UserError(f"mamba3_A_floor={self.A_floor} must be above 0.")
        if self.state_dim % 2:
            raise UserError(
                f"mamba_state_dim={self.state_dim} must be even: channels turn in pairs."
            )
        if not 0 < self.rope_fraction <= 1 or self.num_angles < 1:
            raise UserError(
                f"mamba3_rope_fraction={self.rope_fraction} must lie in "
                f"[{2 / self.state_dim:g}, 1]: at least one pair of the "
                f"mamba_state_dim={self.state_dim} channels turns."
            )

    @property
    def num_angles(self) -> int:
        """``S``, the channel pairs that rotate."""
        return int(self.state_dim * self.rope_fraction) // 2
