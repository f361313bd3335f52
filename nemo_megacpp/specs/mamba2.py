"""M in mode ``nemo_native``: Megatron's own ``MambaMixer`` (Mamba-2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_megacpp.formulas.collectives import Collective, column_parallel, exchange, row_parallel
from nemo_megacpp.formulas.saved import Saved, norm

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.formulas.sizes import Sizes

# Of Megatron's MambaMixer and of mamba_ssm, which the configuration cannot change.
MAMBA_CONV_KERNEL = 4
MAMBA_CHUNK = 128

Items = list[tuple[str, int]]
"""What is saved, and its bytes."""


def mamba2_layer_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """Return Megatron's ``MambaLayer``; the norm is fused into the mixer's input projection."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.mixers.mamba2 import Mamba2Mixer

    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            mixer=ModuleSpec(
                module=Mamba2Mixer,
                submodules=MambaMixerSubmodules(
                    in_proj=backend.column_parallel_layer_norm_linear(),
                    out_proj=backend.row_parallel_linear(),
                ),
            ),
            mamba_bda=get_bias_dropout_add,
        ),
    )


def mamba2_collectives(sizes: Sizes) -> list[Collective]:
    """Megatron's ``MambaMixer``; under CP each kind of channel is exchanged on its own."""
    config, layout = sizes.config, sizes.layout
    heads, groups = sizes.mamba_heads // layout.tp, int(config.mamba_num_groups) // layout.tp
    inner = heads * int(config.mamba_head_dim)
    state = groups * max(1, layout.cp // groups) * int(config.mamba_state_dim)
    channels = (("z", inner), ("x", inner), ("B", state), ("C", state), ("dt", heads))
    exchanged = [
        collective
        for what, width in (*channels, ("scan output", inner))
        for collective in exchange(sizes, width, what)
    ]
    return [
        *column_parallel(sizes, "normed hidden states"),
        *exchanged,
        *row_parallel(sizes, "mixer output"),
    ]


def mamba2_saved(sizes: Sizes) -> list[Saved]:
    """Return what a layer saves of one microbatch."""
    return [*norm(sizes), *(Saved(*item) for item in _scan(sizes))]


def _scan(sizes: Sizes) -> Items:
    """Megatron's ``MambaMixer`` between its projections, and its gated norm."""
    config, tp, cp, e, wide = sizes.config, sizes.layout.tp, sizes.layout.cp, sizes.e, sizes.wide
    heads = sizes.mamba_heads // tp // cp
    groups = max(1, int(config.mamba_num_groups) // tp // cp)
    dim, state = int(config.mamba_head_dim), int(config.mamba_state_dim)
    length, batch = sizes.length * cp, sizes.batch
    tokens = length * batch
    inner, channels = heads * dim, heads * dim + 2 * groups * state
    projected = 2 * inner + 2 * groups * state + heads
    norm_groups = int(config.mamba_num_groups) // tp
    gated: Items = [
        ("gated norm: input and normed", 2 * tokens * inner * wide),
        ("gated norm: scale", sizes.tokens * norm_groups * 4),
        ("output projection's input", tokens * inner * e),
    ]
    if sizes.job.kernels == "gpu":
        # mamba_ssm's fused function keeps what goes in and its output before the gate.
        return [
            ("projected z, x, B, C, dt", tokens * projected * e),
            ("scan output before and after the gate", 2 * tokens * inner * e),
            *gated[1:],
        ]
    size = min(MAMBA_CHUNK, length)
    chunks = -(-length // size)
    padded = chunks * size * batch
    square = padded * heads * size * wide
    viewed = e == wide and groups == 1 and padded == tokens
    scan: Items = [
        ("convolution: padded input", batch * (length + MAMBA_CONV_KERNEL - 1) * channels * wide),
        ("convolution: taps", channels * MAMBA_CONV_KERNEL * wide),
        ("convolution: before SiLU", tokens * channels * wide),
        ("step sizes and decays", (2 * tokens + 2 * padded + batch * chunks) * heads * wide),
        ("decays inside chunks", square),
        ("scores inside chunks", padded * groups * size * wide + square),
        # One group in whole chunks is a view of the convolution's output.
        ("B and C in chunks", 0 if viewed else 2 * padded * groups * state * wide),
        ("B and C for each head", 2 * padded * heads * state * wide),
        ("inputs, weighted inputs and reads", 4 * padded * inner * wide),
        ("states before chunks", batch * chunks * heads * dim * state * wide),
        ("gate and gated sum", 2 * tokens * inner * wide),
    ]
    if e == wide:
        scan.append(("convolution's output", tokens * channels * wide))
        scan.append(("projected z, x, B, C, dt", tokens * projected * wide))
    else:
        scan.append(("x and z in float32", 2 * tokens * inner * wide))
    return scan + gated


def mamba2_mixing(sizes: Sizes) -> int:
    """Return the operations of the scan, for one token."""
    config = sizes.config
    return scan_operations(
        sizes.length,
        sizes.mamba_heads * int(config.mamba_head_dim),
        int(config.mamba_num_groups),
        int(config.mamba_state_dim),
    )


def scan_operations(length: int, inner: int, groups: int, state: int) -> int:
    """A chunked scan: scores and outputs inside the causal half of chunks, states in and out."""
    chunk = min(MAMBA_CHUNK, length)
    return chunk * (groups * state + inner) + 4 * inner * state
