"""What the scans of M and R keep for the backward pass: formulas, as ``(what, bytes)``.

The torch forms are compositions of many small operations, each of which keeps its inputs; the list
follows :mod:`nemo_megacpp.mixers.kernels` line by line. Under CP heads are spread over cp and every
rank holds all tokens of its heads, so that tokens times heads stay what they were.
"""

from __future__ import annotations

from nemo_megacpp.contract.sizes import MAMBA_CHUNK, MAMBA_CONV_KERNEL, Sizes
from nemo_megacpp.mixers.kernels.m2rnn_triton import CHECKPOINT_EVERY
from nemo_megacpp.mixers.mamba3_rows import rank_share, rows_per_head, split_rows

Items = list[tuple[str, int]]


def mamba2_scan(sizes: Sizes) -> Items:
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


def mamba3_scan(sizes: Sizes) -> Items:
    """Our Mamba-3 mixer between its projections."""
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


def recurrent_scan(sizes: Sizes) -> Items:
    """Our M²RNN mixer between its projections."""
    dims, e, wide, cp = sizes.m2rnn, sizes.e, sizes.wide, sizes.layout.cp
    spread = 1 if sizes.m2rnn_is_serial else cp
    heads, length, batch = sizes.m2rnn_heads // spread, sizes.length * spread, sizes.batch
    tokens, inner = length * batch, heads * dims.value_head_dim
    shared = 2 * dims.key_head_dim
    channels = shared + inner
    rows = sizes.m2rnn_heads * (2 * dims.value_head_dim + 1) + shared
    items: Items = [
        ("projection's joined weight", rows * sizes.h * e),
        ("convolution: padded input", batch * (length + dims.conv_kernel - 1) * channels * wide),
        ("convolution: taps", channels * dims.conv_kernel * wide),
        ("convolution: before SiLU", tokens * channels * wide),
        ("convolution: output", tokens * channels * e),
        ("forget gates", 3 * tokens * heads * wide + 2 * heads * wide),
        ("output, gate and gated output", 3 * tokens * inner * e),
        ("norm: input and scale", sizes.tokens * (sizes.m2rnn_heads * dims.value_head_dim + 1) * 4),
        ("norm: normed and output", 2 * tokens * inner * e),
    ]
    state = heads * dims.key_head_dim * dims.value_head_dim
    if sizes.m2rnn_in_triton:
        kept = batch * -(-length // CHECKPOINT_EVERY)
        items.append((f"states of the recurrence, one in {CHECKPOINT_EVERY}", kept * state * 4))
        items.append(("q, k and v, each by itself", tokens * channels * e))
        return items
    items.append(("every state of the recurrence", batch * (length + 1) * state * wide))
    if e != wide:
        items.append(("q, k and v in float32", tokens * channels * wide))
        items.append(
            ("state weight in float32", heads * dims.value_head_dim * dims.value_head_dim * wide)
        )
    return items
