"""R: the M²RNN mixer inside Megatron's own ``MambaLayer``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_megacpp.families import BlockFamily, register
from nemo_megacpp.formulas.collectives import (
    Collective,
    Role,
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
from nemo_megacpp.layout.rules import Divides
from nemo_megacpp.mixer_settings import row_padding

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.formulas.sizes import Sizes


def recurrent_layer_spec(backend: BackendSpecProvider, fields: HybridFields) -> ModuleSpec:
    """Return Megatron's ``MambaLayer`` around :class:`M2RNNMixer`, or with ``depth_state`` the
    :class:`DepthStateLayer`."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.mixer_settings import M2RNNSettings
    from nemo_megacpp.mixers.depth_state import DepthStateLayer
    from nemo_megacpp.mixers.head_parallel import MixerSubmodules
    from nemo_megacpp.mixers.linear import SharedColumnParallelLinear
    from nemo_megacpp.mixers.m2rnn_mixer import M2RNNMixer
    from nemo_megacpp.specs.backend import mamba_layer

    settings = M2RNNSettings.of(fields)
    mixer = ModuleSpec(
        module=M2RNNMixer,
        params={"settings": settings},
        submodules=MixerSubmodules(SharedColumnParallelLinear, backend.row_parallel_linear()),
    )
    layer = mamba_layer(mixer, backend)
    if settings.depth_state:
        layer.module = DepthStateLayer
    return layer


def _collectives(sizes: Sizes) -> list[Collective]:
    """Our M²RNN mixer, in either form of CP."""
    dims, heads = sizes.m2rnn, sizes.m2rnn_heads
    shared, inner = 2 * dims.key_head_dim, heads * dims.value_head_dim
    split = heads * (2 * dims.value_head_dim + 1)
    square = sizes.tokens * sizes.wide
    made = column_parallel(sizes, "normed hidden states")
    made += replicated_weight(sizes, shared * sizes.h, "the rows of q and k")
    made += replicated_weight(sizes, shared * dims.conv_kernel, "q and k's convolution")
    if sizes.m2rnn_is_serial:
        made += exchange(sizes, shared, "q and k, to segments")
        made += exchange(sizes, split, "v, forget and gate, to segments")
        window = sizes.batch * (shared + inner) * (dims.conv_kernel - 1) * sizes.e
        state = sizes.batch * heads * dims.key_head_dim * dims.value_head_dim * sizes.wide
        if window:
            made += _handed_on(window, "convolution window")
        made += _handed_on(state, "recurrent state")
        made += exchange(sizes, inner, "scan output, to zigzag")
    else:
        whole = sizes.tokens * sizes.layout.cp * shared * sizes.e
        made += there_and_back(
            "all_gather", "reduce_scatter", "cp", whole, "layout transition", "q and k"
        )
        made += exchange(sizes, split, "v, forget and gate")
        made += exchange(sizes, inner, "scan output")
    made += there_and_back(
        "all_reduce", "all_reduce", "tp", square, "sum", "mean square of each token"
    )
    made += row_parallel(sizes, "mixer output")
    return made + (again(made) if sizes.recomputes("m2rnn") else [])


def depth_state_taken(sizes: Sizes) -> list[Collective]:
    """What an R block with ``depth_state`` makes of the state that it takes."""
    width, what = sizes.m2rnn.value_head_dim, "depth state"
    size = sizes.tokens * width * sizes.e
    if sizes.layout.sp:
        made = there_and_back("all_gather", "reduce_scatter", "tp", size, "gather boundary", what)
    else:
        made = [Collective("all_reduce", "tp", size, "backward", "sum", f"gradient of {what}")]
    if sizes.m2rnn_is_serial:
        return made + exchange(sizes, width, "depth state, to segments")
    whole = size * sizes.layout.cp
    role: Role = "layout transition"
    return made + there_and_back("all_gather", "reduce_scatter", "cp", whole, role, what)


def depth_state_handed_on(sizes: Sizes) -> list[Collective]:
    """What an R block makes of the state that it hands on: a sum over all heads."""
    what = "depth state, summed over heads"
    size = sizes.tokens * sizes.m2rnn.value_head_dim * sizes.e
    if sizes.layout.sp:
        return there_and_back("reduce_scatter", "all_gather", "tp", size, "sum", what)
    return [Collective("all_reduce", "tp", size, "forward", "sum", what)]


def _handed_on(size: int, what: str) -> list[Collective]:
    """A state passed from segment to segment, and its gradient back; the ends have one side."""
    gradient = f"gradient of the {what}"
    return [
        Collective("receive", "cp", size, "forward", "hand-over", what, neighbour=-1),
        Collective("send", "cp", size, "forward", "hand-over", what, neighbour=1),
        Collective("receive", "cp", size, "backward", "hand-over", gradient, neighbour=1),
        Collective("send", "cp", size, "backward", "hand-over", gradient, neighbour=-1),
    ]


def _saved_activations(sizes: Sizes) -> list[Saved]:
    scan = [] if sizes.recomputes("m2rnn") else _scan(sizes)
    return [*norm(sizes), *(Saved(*item) for item in scan)]


def _scan(sizes: Sizes) -> list[tuple[str, int]]:
    """What our mixer saves between its projections, as ``(what, bytes)``."""
    from nemo_megacpp.mixers.kernels import m2rnn_scan, m2rnn_triton

    dims, e, wide, cp = sizes.m2rnn, sizes.e, sizes.wide, sizes.layout.cp
    spread = 1 if sizes.m2rnn_is_serial else cp
    heads, length, batch = sizes.m2rnn_heads // spread, sizes.length * spread, sizes.batch
    tokens, inner = length * batch, heads * dims.value_head_dim
    shared = 2 * dims.key_head_dim
    channels = shared + inner
    rows = sizes.m2rnn_heads * (2 * dims.value_head_dim + 1) + shared
    rows += row_padding(rows)
    # Where q and k are copied for the kernel, the output is kept for v alone.
    keeps_output = not dims.depth_state or (e == wide and not sizes.m2rnn_in_triton)
    items = [
        ("projection's joined weight", rows * sizes.h * e),
        ("convolution: padded input", batch * (length + dims.conv_kernel - 1) * channels * wide),
        ("convolution: taps", channels * dims.conv_kernel * wide),
        ("convolution: before SiLU", tokens * channels * wide),
        ("convolution: output", tokens * channels * e if keeps_output else 0),
        ("forget gates", 3 * tokens * heads * wide + 2 * heads * wide),
        ("output, gate and gated output", 3 * tokens * inner * e),
        ("norm: input and scale", sizes.tokens * (sizes.m2rnn_heads * dims.value_head_dim + 1) * 4),
        ("norm: normed and output", 2 * tokens * inner * e),
    ]
    state = heads * dims.key_head_dim * dims.value_head_dim
    kernel = m2rnn_triton if sizes.m2rnn_in_triton else m2rnn_scan
    kept = batch * -(-length // kernel.CHECKPOINT_EVERY) * state
    if dims.depth_state:
        items.append(("depth state", tokens * dims.value_head_dim * e))
        if not sizes.m2rnn_in_triton:  # else below, by itself
            items.append(("values with the depth state", tokens * inner * e))
    items.append((f"states of the recurrence, one in {kernel.CHECKPOINT_EVERY}", kept * wide))
    if sizes.m2rnn_in_triton:
        items.append(("q, k and v, each by itself", tokens * channels * e))
    elif e != wide:
        items.append(("q, k and v in float32", tokens * channels * wide))
        items.append(
            ("state weight in float32", heads * dims.value_head_dim * dims.value_head_dim * wide)
        )
    return items


def _mixing(sizes: Sizes) -> int:
    """``H W``, the outer product of key and value, and the read-out, for each head's state."""
    dims = sizes.m2rnn
    width = dims.value_head_dim
    return 2 * dims.heads(sizes.h) * dims.key_head_dim * width * (width + 2)


def _sequential_steps(sizes: Sizes) -> int:
    """Every token of a row: CP either gives each rank whole rows of some heads, or lets a segment
    wait for the one before it. Heads and rows of a microbatch run side by side."""
    return sizes.config.seq_length


def _inference_state(sizes: Sizes) -> list[KeptState]:
    settings, heads = sizes.m2rnn, sizes.m2rnn_heads
    key, value = settings.key_head_dim, settings.value_head_dim
    window = (2 * key + heads * value) * (settings.conv_kernel - 1)
    return [
        KeptState("convolution's window", window * sizes.e),
        KeptState("matrix states", heads * key * value * sizes.wide),
    ]


register(
    BlockFamily(
        letter="R",
        name="recurrent",
        layer_spec=recurrent_layer_spec,
        rules=(
            Divides(
                "recurrent-heads",
                "m2rnn_num_heads",
                "tp",
                "each rank of an R block holds whole heads",
            ),
        ),
        required=("m2rnn_num_heads",),
        collectives=_collectives,
        saved_activations=_saved_activations,
        mixing=_mixing,
        sequential_steps=_sequential_steps,
        inference_state=_inference_state,
    )
)
