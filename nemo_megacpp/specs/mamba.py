"""M: a Mamba mixer, Megatron's own (mode ``nemo_native``) or Mamba-3 (mode ``mamba3``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nemo_megacpp.families import BlockFamily, register
from nemo_megacpp.formulas.collectives import (
    Collective,
    again,
    column_parallel,
    exchange,
    replicated_weight,
    row_parallel,
    there_and_back,
)
from nemo_megacpp.formulas.inference import KeptState
from nemo_megacpp.formulas.saved import Saved, norm
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.layout.rules import Divides, GroupsDivideHeads, LayoutCheck, LayoutViolation
from nemo_megacpp.mixer_settings import row_padding

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.formulas.sizes import Sizes

# Of Megatron's MambaMixer and of mamba_ssm, which the configuration cannot change.
MAMBA_CONV_KERNEL = 4
MAMBA_CHUNK = 128
# The most tokens in a chunk of the scan that plain torch runs (mixers.kernels.chunks).
SCAN_CHUNK = 64

Items = list[tuple[str, int]]
"""What is saved, and its bytes."""


def mamba_layer_spec(backend: BackendSpecProvider, fields: HybridFields) -> ModuleSpec:
    """Return Megatron's ``MambaLayer`` around the mixer of ``fields.mode``."""
    from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.mixer_settings import Mamba3Settings
    from nemo_megacpp.mixers.head_parallel import MixerSubmodules
    from nemo_megacpp.mixers.linear import SharedColumnParallelLinear
    from nemo_megacpp.mixers.mamba2_mixer import Mamba2Mixer
    from nemo_megacpp.mixers.mamba3_mixer import Mamba3Mixer
    from nemo_megacpp.specs.backend import mamba_layer

    if fields.mode == "nemo_native":
        # The norm is fused into the input projection.
        submodules = MambaMixerSubmodules(
            in_proj=backend.column_parallel_layer_norm_linear(),
            out_proj=backend.row_parallel_linear(),
        )
        return mamba_layer(ModuleSpec(module=Mamba2Mixer, submodules=submodules))
    mixer = ModuleSpec(
        module=Mamba3Mixer,
        params={"settings": Mamba3Settings.of(fields)},
        submodules=MixerSubmodules(SharedColumnParallelLinear, backend.row_parallel_linear()),
    )
    return mamba_layer(mixer, backend)


def _context_parallel(check: LayoutCheck) -> Iterator[LayoutViolation]:
    # Under CP an M block turns from sequence shards to head shards, on top of TP's split. Source:
    # megatron/core/ssm/mamba_context_parallel.py.
    tp, cp = check.layout.tp, check.layout.cp
    heads, groups = check.shape.mamba_num_heads, check.shape.mamba_num_groups
    if cp == 1:
        return
    if heads and heads % (tp * cp):
        yield LayoutViolation(
            "CP",
            "mamba-heads-cp",
            f"mamba_num_heads = {heads} is not divisible by TP x CP = {tp} x {cp} = {tp * cp}: "
            f"under CP an M block shards its heads over TP and CP.",
            knobs=("cp", "tp"),
        )
    if groups and groups % tp == 0:
        local = groups // tp
        if local % cp and cp % local:
            yield LayoutViolation(
                "CP",
                "mamba-groups-cp",
                f"mamba_num_groups = {groups} at TP = {tp} leaves {local} groups a rank, which "
                f"CP = {cp} neither divides nor is divisible by.",
                knobs=("cp", "tp"),
            )


def _chunks(length: int, tokens: int) -> int:
    """Return the chunks of a row of one document, of at most ``tokens`` each: a power of two
    (:func:`nemo_megacpp.mixers.kernels.chunks.cut_into_chunks`)."""
    return -(-length // (1 << (tokens.bit_length() - 1)))


def _is_mamba3(sizes: Sizes) -> bool:
    return sizes.config.mode == "mamba3"


def _collectives(sizes: Sizes) -> list[Collective]:
    made = [
        *column_parallel(sizes, "normed hidden states"),
        *(_mamba3_exchanges(sizes) if _is_mamba3(sizes) else _mamba2_exchanges(sizes)),
        *row_parallel(sizes, "mixer output"),
    ]
    return made + (again(made) if sizes.recomputes("mamba") else [])


def _saved_activations(sizes: Sizes) -> list[Saved]:
    if sizes.recomputes("mamba"):
        # Megatron's mixer has the norm inside; before ours it stands alone.
        inside = [Saved("norm: input", sizes.shared_tokens * sizes.h * sizes.e)]
        return norm(sizes) if _is_mamba3(sizes) else inside
    scan = _mamba3_scan(sizes) if _is_mamba3(sizes) else _mamba2_scan(sizes)
    return [*norm(sizes), *(Saved(*item) for item in scan)]


def _mixing(sizes: Sizes) -> int:
    """A chunked scan: scores and outputs inside the causal half of chunks, states in and out."""
    if _is_mamba3(sizes):
        dims = sizes.mamba3
        heads, dim, groups, state = dims.num_heads, dims.head_dim, dims.num_groups, dims.state_dim
        rank = dims.mimo_rank
    else:
        config, heads, rank = sizes.config, sizes.mamba_heads, 1
        dim, groups = int(config.mamba_head_dim), int(config.mamba_num_groups)
        state = int(config.mamba_state_dim)
    inner, chunk = heads * dim * rank, min(MAMBA_CHUNK, sizes.length)
    return chunk * (groups * rank * state + inner) + 4 * inner * state


def _mamba2_exchanges(sizes: Sizes) -> list[Collective]:
    """Megatron's ``MambaMixer``; under CP each kind of channel is exchanged on its own."""
    config, layout = sizes.config, sizes.layout
    heads, groups = sizes.mamba_heads // layout.tp, int(config.mamba_num_groups) // layout.tp
    inner = heads * int(config.mamba_head_dim)
    state = groups * max(1, layout.cp // groups) * int(config.mamba_state_dim)
    channels = (("z", inner), ("x", inner), ("B", state), ("C", state), ("dt", heads))
    return [
        collective
        for what, width in (*channels, ("scan output", inner))
        for collective in exchange(sizes, width, what)
    ]


def _mamba2_scan(sizes: Sizes) -> Items:
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
    chunks = _chunks(length, SCAN_CHUNK)
    # Before each chunk and after the last; a row of one chunk starts from zero and needs none.
    states = chunks + 1 if chunks > 1 else 0
    scan: Items = [
        ("convolution: padded input", batch * (length + MAMBA_CONV_KERNEL - 1) * channels * wide),
        ("convolution: taps", channels * MAMBA_CONV_KERNEL * wide),
        ("convolution: before SiLU", tokens * channels * wide),
        ("step sizes and their decays", 3 * tokens * heads * wide),
        ("A and its exponential", 2 * heads * wide),
        ("states between chunks", batch * states * heads * dim * state * wide),
        ("gate and gated sum", 2 * tokens * inner * wide),
    ]
    if e == wide:
        scan.append(("convolution's output", tokens * channels * wide))
        scan.append(("projected z, x, B, C, dt", tokens * projected * wide))
    else:
        scan.append(("x and z in float32", 2 * tokens * inner * wide))
        scan.append(("B and C in float32", 2 * tokens * groups * state * wide))
        scan.append(("gated norm: weight in float32", inner * cp * wide))
    return scan + gated


def _mamba3_exchanges(sizes: Sizes) -> list[Collective]:
    """Our Mamba-3 mixer; see :mod:`nemo_megacpp.mixers.mamba3_rows` for what goes where."""
    from nemo_megacpp.mixers.mamba3_rows import rank_share, rows_of_group_state, rows_per_head

    dims, layout = sizes.mamba3, sizes.layout
    heads, groups, copies = rank_share(dims, layout.tp, layout.cp)
    block = rows_of_group_state(dims) + heads // groups // copies * rows_per_head(dims)
    angles = sizes.tokens * layout.cp * dims.num_angles * sizes.e
    return [
        *replicated_weight(sizes, dims.num_angles * sizes.h, "the rows of θ̂"),
        *there_and_back(
            "all_gather", "reduce_scatter", "cp", angles, "layout transition", "angle rates θ̂"
        ),
        *exchange(sizes, groups * copies * block, "B, C, z, x and the head's numbers"),
        *replicated_weight(sizes, dims.state_dim, "B's norm weight"),
        *replicated_weight(sizes, dims.state_dim, "C's norm weight"),
        *exchange(sizes, heads * dims.head_dim, "scan output"),
    ]


def _mamba3_scan(sizes: Sizes) -> Items:
    """What our mixer saves between its projections."""
    from nemo_megacpp.mixers.mamba3_rows import rank_share, rows_per_head, split_rows

    dims, cp, e, wide = sizes.mamba3, sizes.layout.cp, sizes.e, sizes.wide
    tp_heads, tp_groups, copies = rank_share(dims, sizes.layout.tp, cp)
    heads, groups = tp_heads // cp, max(1, tp_groups * copies // cp)
    rank, dim, state, angles = dims.mimo_rank, dims.head_dim, dims.state_dim, dims.num_angles
    length, batch = sizes.length * cp, sizes.batch
    tokens, inner = length * batch, heads * dim
    rows = split_rows(dims) // sizes.layout.tp
    padding = row_padding(rows + angles)
    weight: Items = [("projection's joined weight", (rows + angles + padding) * sizes.h * e)]
    block = groups * 2 * rank * state + heads * rows_per_head(dims)
    output: Items = [("output projection's input", tokens * inner * e)]
    if sizes.job.kernels == "gpu" and rank == 1:
        # mamba_ssm's SISO function keeps q, k, v, the numbers of each token, and its output.
        return [
            *weight,
            ("projected B, C, z, x and numbers", tokens * (block + angles) * e),
            ("B and C, normed", 2 * tokens * groups * state * (wide + e)),
            ("scan output and gate", 2 * tokens * inner * wide),
            ("step sizes, decays, mixes", 6 * tokens * heads * wide),
            *output,
        ]
    chunks = _chunks(length, max(SCAN_CHUNK // rank, 1))
    per_head = tokens * heads * wide
    values = tokens * heads * rank * dim * wide
    scan: Items = [
        ("B and C: scales and normed", 2 * tokens * groups * rank * (state + 1) * wide),
        ("step sizes, decays, mixes, weights", 11 * per_head + tokens * angles * wide),
        ("where weights are positive", tokens * heads),
        ("angle steps (float64)", tokens * (heads + angles) * 8),
        ("sines and cosines", 2 * tokens * heads * angles * wide),
        ("B and C rotated", 2 * tokens * heads * rank * state * wide),
        # The first, before each chunk, and after the last, which the scan returns.
        ("states between chunks", batch * (chunks + 2) * heads * dim * state * wide),
        ("gate and output", 2 * tokens * heads * rank * dim * wide),
    ]
    if rank > 1:
        scan.append(("mimo products", 3 * values))
        scan.append(("weights of the token before", per_head))
        first = batch * heads * (dim + rank * state) * wide
        scan.append(("value and keys before the first token", first))
    if e == wide:
        beside = angles + padding if cp == 1 else 0  # one output, until cp gathers θ̂ apart
        scan.append(("projected B, C, z, x and numbers", tokens * (block + beside) * e))
        if groups > 1:  # else a view of the projection
            scan.append(("numbers of each head", tokens * heads * rows_per_head(dims) * wide))
    else:
        scan.append(("B and C in float32", 2 * tokens * groups * rank * state * wide))
        scan.append(("decays in float32", per_head))
        scan.append(("values and gate in float32", 2 * tokens * inner * wide))
    return weight + scan + output


def _inference_state(sizes: Sizes) -> list[KeptState]:
    config, tp, wide = sizes.config, sizes.layout.tp, sizes.wide
    if _is_mamba3(sizes):
        from nemo_megacpp.mixers.kernels.mamba3_state import mamba3_state_shapes

        dims = sizes.mamba3
        names = ("states", "last token's keys", "last token's values", "angles")
        shapes = mamba3_state_shapes(dims, dims.num_heads // tp)
        return [
            KeptState(name, math.prod(shape) * wide)
            for name, shape in zip(names, shapes, strict=True)
        ]
    heads, state = sizes.mamba_heads // tp, int(config.mamba_state_dim)
    inner = heads * int(config.mamba_head_dim)
    channels = inner + 2 * int(config.mamba_num_groups) // tp * state
    return [
        KeptState("convolution's window", channels * (MAMBA_CONV_KERNEL - 1) * sizes.e),
        KeptState("states", inner * state * wide),
    ]


register(
    BlockFamily(
        letter="M",
        name="Mamba",
        layer_spec=mamba_layer_spec,
        rules=(
            Divides(
                "mamba-heads", "mamba_num_heads", "tp", "each rank of an M block holds whole heads"
            ),
            Divides(
                "mamba-groups",
                "mamba_num_groups",
                "tp",
                "each rank of an M block holds whole B/C groups, with their heads",
            ),
            GroupsDivideHeads("mamba-heads-per-group", "mamba_num_heads", "mamba_num_groups"),
            _context_parallel,
        ),
        required=("mamba_num_heads", "mamba_num_groups"),
        collectives=_collectives,
        saved_activations=_saved_activations,
        mixing=_mixing,
        inference_state=_inference_state,
    )
)
