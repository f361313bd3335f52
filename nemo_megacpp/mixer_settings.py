"""The settings of this package's own mixers: names, meaning, defaults, legal values.

A layer spec passes one of these to its mixer (``ModuleSpec.params``). A configuration declares each
field under the mixer's prefix (:class:`nemo_megacpp.hybrid_fields.HybridFields`), with the default
given here. Loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from nemo_megacpp.errors import UserError

ClipOrder = Literal["before_output", "after_output"]
SequenceExchange = Literal["auto", "all_to_all", "serial"]
AActivation = Literal["softplus", "heavy_tail"]
Pairs = Literal["interleaved", "halves"]
Kernel = Literal["auto", "torch", "triton"]


def row_padding(rows: int) -> int:
    """Return the zeros with which our input projections end a token's ``rows`` outputs: to a
    multiple of eight, 16 bytes in bfloat16, the alignment that tensor cores want of a row."""
    return -rows % 8


@dataclass(frozen=True)
class MixerSettings:
    """The base of a mixer's settings: a frozen dataclass with a prefix."""

    prefix: ClassVar[str]

    @classmethod
    def of(cls, config: Any) -> Self:
        """Return the settings that ``config`` holds in its fields ``PREFIX_name``.

        Args:
            config: a :class:`nemo_megacpp.hybrid_fields.HybridFields` or ``HybridConfig``.

        Raises:
            UserError: a setting is illegal.
        """
        return cls(**{f.name: getattr(config, cls.prefix + f.name) for f in fields(cls)})


@dataclass(frozen=True)
class M2RNNSettings(MixerSettings):
    """Settings of the R mixer (arXiv 2603.14360; defaults are the authors').

    Attributes:
        num_heads: ``N``; None: as many as make ``N·V`` the hidden size.
        key_head_dim: ``K``, rows of a head's state.
        value_head_dim: ``V``, columns of a head's state.
        conv_kernel: taps of the causal convolution over q, k and v.
        state_gradient_clip: elementwise bound on the carried gradient ``dH`` of the mean loss over
            the global batch, so that it is the same bound in every layout; None for no bound.
        clip_order: clip the carried ``dH`` before or after ``q_t dy_tᵀ`` is added to it.
        context_parallel: how CP splits the recurrence. ``all_to_all`` spreads heads over cp,
            ``serial`` hands the state from segment to segment; ``auto`` is ``all_to_all`` if
            the heads of a tensor-parallel rank divide by cp, else ``serial``.
        kernel: ``torch``, ``triton`` (this package's; an error where it cannot run), or ``auto``:
            ``triton`` where it can run.
        depth_state: hand each token's read-out, averaged over heads, to the next R block in depth,
            which adds it to its values through a learned gate.

    Raises:
        UserError: a setting is illegal.
    """

    prefix: ClassVar[str] = "m2rnn_"

    num_heads: int | None = None
    key_head_dim: int = 64
    value_head_dim: int = 16
    conv_kernel: int = 4
    state_gradient_clip: float | None = 1.0
    clip_order: ClipOrder = "before_output"
    context_parallel: SequenceExchange = "auto"
    kernel: Kernel = "auto"
    depth_state: bool = False

    def __post_init__(self) -> None:
        for name in ("num_heads", "key_head_dim", "value_head_dim", "conv_kernel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"m2rnn_{name}={value} must be at least 1.")
        clip = self.state_gradient_clip
        if clip is not None and not clip > 0:
            raise UserError(
                f"m2rnn_state_gradient_clip={clip} must be above 0, or null for no bound."
            )

    def heads(self, hidden_size: int) -> int:
        """Return the number of heads of a model of this hidden size.

        Raises:
            UserError: ``num_heads`` is None and ``value_head_dim`` does not divide the size.
        """
        if self.num_heads is not None:
            return self.num_heads
        if hidden_size % self.value_head_dim:
            raise UserError(
                f"hidden_size={hidden_size} is not a multiple of m2rnn_value_head_dim="
                f"{self.value_head_dim}, so the number of heads has no default: set "
                f"m2rnn_num_heads."
            )
        return hidden_size // self.value_head_dim

    def is_serial(self, heads: int, cp: int) -> bool:
        """Return whether CP hands the state on instead of spreading ``heads``, those of a
        tensor-parallel rank."""
        return cp > 1 and (self.context_parallel == "serial" or heads % cp != 0)


@dataclass(frozen=True)
class Mamba3Settings(MixerSettings):
    """Settings of the M mixer in mode ``mamba3``, beside Megatron's ``mamba_*`` sizes (defaults are
    mamba_ssm 2.3.2's).

    Attributes:
        mimo_rank: ``R``, inputs and outputs per head and token; 1 is SISO.
        rope_fraction: share of the state that rotates, in (0, 1].
        A_activation: ``a`` in ``A = min(-a(dd_A), -A_floor)``.
        A_floor: slowest decay rate, above 0.
        pairs: which state channels rotate together, ``(2i, 2i+1)`` (``interleaved``) or
            ``(i, i + N/2)`` (``halves``); None: as mamba_ssm's kernels, ``interleaved`` for SISO
            and ``halves`` for MIMO.
        output_norm: RMS norm of each head's ``P`` outputs before the gate.
        kernel: ``torch``, ``triton`` (mamba_ssm's SISO kernel; an error where it cannot run), or
            ``auto``: ``triton`` where it can run.

    Raises:
        UserError: a setting is illegal.
    """

    prefix: ClassVar[str] = "mamba3_"

    mimo_rank: int = 1
    rope_fraction: float = 0.5
    A_activation: AActivation = "softplus"
    A_floor: float = 1e-4
    pairs: Pairs | None = None
    output_norm: bool = False
    kernel: Kernel = "auto"

    def __post_init__(self) -> None:
        if self.mimo_rank < 1:
            raise UserError(f"mamba3_mimo_rank={self.mimo_rank} must be at least 1; 1 is SISO.")
        if not self.A_floor > 0:
            raise UserError(f"mamba3_A_floor={self.A_floor} must be above 0.")

    def dimensions(self, config: Any) -> Mamba3Dimensions:
        """Return all sizes of the mixer in a model.

        Args:
            config: Megatron's configuration. Without ``mamba_num_heads`` the heads are twice the
                hidden size wide, as in Megatron's ``MambaMixer``.

        Raises:
            UserError: a size is illegal.
        """
        state_dim = config.mamba_state_dim
        if state_dim % 2:
            raise UserError(f"mamba_state_dim={state_dim} must be even: channels rotate in pairs.")
        num_angles = int(state_dim * self.rope_fraction) // 2 if 0 < self.rope_fraction <= 1 else 0
        if state_dim > 0 and num_angles < 1:
            raise UserError(
                f"mamba3_rope_fraction={self.rope_fraction} must lie in [{2 / state_dim:g}, 1]: at "
                f"least one pair of the mamba_state_dim={state_dim} channels rotates."
            )
        heads = config.mamba_num_heads
        return Mamba3Dimensions(
            num_heads=(
                2 * config.hidden_size // max(config.mamba_head_dim, 1) if heads is None else heads
            ),
            head_dim=config.mamba_head_dim,
            state_dim=state_dim,
            num_groups=config.mamba_num_groups,
            mimo_rank=self.mimo_rank,
            num_angles=num_angles,
            pairs=self.pairs or ("interleaved" if self.mimo_rank == 1 else "halves"),
        )


@dataclass(frozen=True)
class Mamba3Dimensions:
    """The sizes of a Mamba-3 mixer, by :meth:`Mamba3Settings.dimensions`.

    Attributes:
        num_heads: ``H``.
        head_dim: ``P``, rows of a head's state.
        state_dim: ``N``, columns of a head's state; even.
        num_groups: ``G``; the ``H/G`` heads of a group share B and C.
        mimo_rank: ``R``.
        num_angles: ``S``, the channel pairs that rotate.
        pairs: which channels are a pair.
    """

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    mimo_rank: int = 1
    num_angles: int = 1
    pairs: Pairs = "interleaved"

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_dim", "state_dim", "num_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"mamba_{name}={getattr(self, name)} must be at least 1.")
        if self.num_heads % self.num_groups:
            raise UserError(
                f"mamba_num_heads={self.num_heads} is not a multiple of "
                f"mamba_num_groups={self.num_groups}."
            )
