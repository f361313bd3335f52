"""M in mode ``mamba3``: the Mamba-3 mixer inside Megatron's own ``MambaLayer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_megacpp.families import own_fields
from nemo_megacpp.formulas.collectives import (
    Collective,
    column_parallel,
    exchange,
    replicated_weight,
    row_parallel,
    there_and_back,
)
from nemo_megacpp.formulas.saved import Saved, norm
from nemo_megacpp.specs.mamba2 import Items, scan_operations

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.formulas.sizes import Sizes


def mamba3_layer_spec(backend: BackendSpecProvider, settings: Mapping[str, Any]) -> ModuleSpec:
    """Return a ``MambaLayer`` around :class:`nemo_megacpp.mixers.mamba3.Mamba3Mixer`.

    The norm is a module of its own here: its output feeds split and shared rows alike.

    Args:
        backend: where the modules come from.
        settings: the mixer's, for a plain configuration.
    """
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.mixers.linear import SharedColumnParallelLinear
    from nemo_megacpp.mixers.mamba3 import Mamba3Mixer, Mamba3MixerSubmodules
    from nemo_megacpp.specs.backend import mamba_layer_norm

    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=mamba_layer_norm(backend),
            mixer=ModuleSpec(
                module=Mamba3Mixer,
                params={"settings": own_fields(settings, "mamba3_")},
                submodules=Mamba3MixerSubmodules(
                    in_proj=SharedColumnParallelLinear, out_proj=backend.row_parallel_linear()
                ),
            ),
            mamba_bda=get_bias_dropout_add,
        ),
    )


def mamba3_collectives(sizes: Sizes) -> list[Collective]:
    """Our Mamba-3 mixer; see :mod:`nemo_megacpp.mixers.mamba3_rows` for what goes where."""
    from nemo_megacpp.mixers.mamba3_rows import rank_share, rows_of_group_state, rows_per_head

    dims, layout = sizes.mamba3, sizes.layout
    heads, groups, copies = rank_share(dims, layout.tp, layout.cp)
    block = rows_of_group_state(dims) + heads // groups // copies * rows_per_head(dims)
    angles = sizes.tokens * layout.cp * dims.num_angles * sizes.e
    return [
        *column_parallel(sizes, "normed hidden states"),
        *replicated_weight(sizes, dims.num_angles * sizes.h, "the rows of θ̂"),
        *there_and_back(
            "all_gather", "reduce_scatter", "cp", angles, "layout transition", "angle rates θ̂"
        ),
        *exchange(sizes, groups * copies * block, "B, C, z, x and the head's numbers"),
        *replicated_weight(sizes, dims.state_dim, "B's norm weight"),
        *replicated_weight(sizes, dims.state_dim, "C's norm weight"),
        *exchange(sizes, heads * dims.head_dim, "scan output"),
        *row_parallel(sizes, "mixer output"),
    ]


def mamba3_saved(sizes: Sizes) -> list[Saved]:
    """Return what a layer saves of one microbatch."""
    return [*norm(sizes), *(Saved(*item) for item in _scan(sizes))]


def _scan(sizes: Sizes) -> Items:
    """What our mixer saves between its projections."""
    from nemo_megacpp.mixers.mamba3_rows import rank_share, rows_per_head, split_rows

    dims, cp, e, wide = sizes.mamba3, sizes.layout.cp, sizes.e, sizes.wide
    tp_heads, tp_groups, copies = rank_share(dims, sizes.layout.tp, cp)
    heads, groups = tp_heads // cp, max(1, tp_groups * copies // cp)
    rank, dim, state, angles = dims.mimo_rank, dims.head_dim, dims.state_dim, dims.num_angles
    length, batch = sizes.length * cp, sizes.batch
    tokens, inner = length * batch, heads * dim
    rows = split_rows(dims) // sizes.layout.tp
    weight: Items = [("projection's joined weight", (rows + angles) * sizes.h * e)]
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
    size = min(max(64 // rank, 1), length)
    chunks = -(-length // size)
    padded = chunks * size * batch
    per_head = tokens * heads * wide
    keys = padded * heads * rank * state * wide
    values = padded * heads * rank * dim * wide
    square = padded * heads * size * wide
    scan: Items = [
        ("B and C: scales and normed", 2 * tokens * groups * rank * (state + 1) * wide),
        ("step sizes, decays, mixes", 8 * per_head + tokens * angles * wide),
        ("angle steps (float64)", tokens * (heads + angles) * 8),
        ("angles, sines and cosines", 5 * padded * heads * angles * wide),
        ("B and C before rotation", 2 * keys),
        ("B and C rotated", 2 * keys),
        ("decays inside chunks", square + (2 * padded + batch * chunks) * heads * wide),
        ("scores inside chunks", 2 * square * rank * rank),
        ("inputs, weighted inputs, reads", 4 * values),
        ("weights of own and next token", 2 * padded * heads * rank * wide + padded * heads * wide),
        ("states before chunks", batch * (chunks + 1) * heads * dim * state * wide),
        ("gate and output", 2 * tokens * heads * rank * dim * wide),
    ]
    if rank > 1:
        scan.append(("mimo products", 4 * values))
    if e == wide:
        scan.append(("projected B, C, z, x and numbers", tokens * (block + _theta(cp, angles)) * e))
        if groups > 1:  # else a view of the projection
            scan.append(("numbers of each head", tokens * heads * rows_per_head(dims) * wide))
    else:
        scan.append(("B and C in float32", 2 * tokens * groups * rank * state * wide))
        scan.append(("decays in float32", per_head))
        scan.append(("values and gate in float32", values + tokens * inner * wide))
    return weight + scan + output


def _theta(cp: int, angles: int) -> int:
    """θ̂ is part of the projection's one output, until cp gathers it apart."""
    return angles if cp == 1 else 0


def mamba3_mixing(sizes: Sizes) -> int:
    """Return the operations of the scan, for one token."""
    dims = sizes.mamba3
    inner = dims.num_heads * dims.head_dim * dims.mimo_rank
    return scan_operations(sizes.length, inner, dims.num_groups * dims.mimo_rank, dims.state_dim)
