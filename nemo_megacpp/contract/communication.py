"""The collectives of each block, in one microbatch: one function per family.

Each function says what its module does, in the order in which it does it; the tests hold them to
recorded runs, collective by collective and byte by byte. Routing is data: what E sends is given for
balanced routing, and the sum over a group's ranks does not depend on it.
"""

from __future__ import annotations

from nemo_megacpp.contract.collectives import (
    Collective,
    again,
    between_several,
    column_parallel,
    replicated_weight,
    row_parallel,
    there_and_back,
)
from nemo_megacpp.contract.sizes import Sizes
from nemo_megacpp.mixers.mamba3_rows import (
    rank_share,
    rows_of_group_state,
    rows_per_head,
)
from nemo_megacpp.pattern import Family


def block_collectives(sizes: Sizes, family: Family) -> list[Collective]:
    """Return what one layer of ``family`` sends in one microbatch, forward and backward."""
    mamba3 = sizes.config.mode == "mamba3"
    made = {
        Family.ATTENTION: _attention,
        Family.MAMBA: _mamba3 if mamba3 else _mamba2,
        Family.EXPERT: _expert,
        Family.RECURRENT: _recurrent,
    }[family](sizes)
    return between_several(sizes, made)


def embedding_collectives(sizes: Sizes) -> list[Collective]:
    """Return what the vocabulary-parallel embedding sends in one microbatch."""
    size, what = sizes.hidden_bytes, "embeddings of the rank's part of the vocabulary"
    if sizes.layout.sp:
        return between_several(
            sizes, there_and_back("reduce_scatter", "all_gather", "tp", size, "sum", what)
        )
    return between_several(sizes, [Collective("all_reduce", "tp", size, "forward", "sum", what)])


def head_collectives(sizes: Sizes) -> list[Collective]:
    """Return what the head and the vocabulary-parallel cross entropy send in one microbatch."""
    numbers = sizes.tokens * 4  # the loss is computed in float32
    return between_several(
        sizes,
        [
            *column_parallel(sizes, "final hidden states"),
            *(
                Collective("all_reduce", "tp", numbers, "forward", "sum", f"{what} of each token")
                for what in ("largest logit", "target's logit", "sum of exponentials")
            ),
        ],
    )


def _attention(sizes: Sizes) -> list[Collective]:
    """``SelfAttention``: Q, K, V split by head; under CP, K and V of the whole sequence."""
    core = _ring(sizes) if sizes.job.kernels == "gpu" else _gathered(sizes)
    return [
        *column_parallel(sizes, "normed hidden states"),
        *core,
        *(again(core) if sizes.recomputes("core_attn") else []),
        *row_parallel(sizes, "attention output"),
    ]


def _gathered(sizes: Sizes) -> list[Collective]:
    """The torch core attention gathers keys and values over cp."""
    whole = sizes.tokens * sizes.layout.cp * sizes.kv_heads * sizes.head_dim * sizes.e
    return [
        collective
        for what in ("keys", "values")
        for collective in there_and_back(
            "all_gather", "reduce_scatter", "cp", whole, "layout transition", what
        )
    ]


def _ring(sizes: Sizes) -> list[Collective]:
    """Transformer Engine passes keys and values around a ring (``cp_comm_type='p2p'``)."""
    steps = sizes.layout.cp - 1
    part = 2 * sizes.tokens * sizes.kv_heads * sizes.head_dim * sizes.e
    if not steps:
        return []
    return [
        Collective("send", "cp", part, "forward", "layout transition", "keys and values", steps, 1),
        Collective(
            "send", "cp", part, "backward", "layout transition", "keys and values", steps, 1
        ),
        Collective(
            "send",
            "cp",
            part,
            "backward",
            "layout transition",
            "gradient of keys and values",
            steps + 1,
            1,
        ),
    ]


def _mamba2(sizes: Sizes) -> list[Collective]:
    """Megatron's ``MambaMixer``; under CP each kind of channel is exchanged on its own."""
    config, layout = sizes.config, sizes.layout
    heads, groups = sizes.mamba_heads // layout.tp, int(config.mamba_num_groups) // layout.tp
    inner = heads * int(config.mamba_head_dim)
    state = groups * max(1, layout.cp // groups) * int(config.mamba_state_dim)
    channels = (("z", inner), ("x", inner), ("B", state), ("C", state), ("dt", heads))
    exchanged = [
        collective
        for what, width in (*channels, ("scan output", inner))
        for collective in _exchange(sizes, width, what)
    ]
    return [
        *column_parallel(sizes, "normed hidden states"),
        *exchanged,
        *row_parallel(sizes, "mixer output"),
    ]


def _mamba3(sizes: Sizes) -> list[Collective]:
    """Our Mamba-3 mixer; see :mod:`nemo_megacpp.mixers.mamba3_rows` for what goes where."""
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
        *_exchange(sizes, groups * copies * block, "B, C, z, x and the head's numbers"),
        *replicated_weight(sizes, dims.state_dim, "B's norm weight"),
        *replicated_weight(sizes, dims.state_dim, "C's norm weight"),
        *_exchange(sizes, heads * dims.head_dim, "scan output"),
        *row_parallel(sizes, "mixer output"),
    ]


def _recurrent(sizes: Sizes) -> list[Collective]:
    """Our M²RNN mixer, in either form of CP."""
    dims, heads = sizes.m2rnn, sizes.m2rnn_heads
    shared, inner = 2 * dims.key_head_dim, heads * dims.value_head_dim
    split = heads * (2 * dims.value_head_dim + 1)
    square = sizes.tokens * sizes.wide
    made = column_parallel(sizes, "normed hidden states")
    made += replicated_weight(sizes, shared * sizes.h, "the rows of q and k")
    made += replicated_weight(sizes, shared * dims.conv_kernel, "q and k's convolution")
    if sizes.m2rnn_is_serial:
        made += _exchange(sizes, shared, "q and k, to segments")
        made += _exchange(sizes, split, "v, forget and gate, to segments")
        window = sizes.batch * (shared + inner) * (dims.conv_kernel - 1) * sizes.e
        state = sizes.batch * heads * dims.key_head_dim * dims.value_head_dim * sizes.wide
        if window:
            made += _handed_on(window, "convolution window")
        made += _handed_on(state, "recurrent state")
        made += _exchange(sizes, inner, "scan output, to zigzag")
    else:
        whole = sizes.tokens * sizes.layout.cp * shared * sizes.e
        made += there_and_back(
            "all_gather", "reduce_scatter", "cp", whole, "layout transition", "q and k"
        )
        made += _exchange(sizes, split, "v, forget and gate")
        made += _exchange(sizes, inner, "scan output")
    made += there_and_back(
        "all_reduce", "all_reduce", "tp", square, "sum", "mean square of each token"
    )
    return made + row_parallel(sizes, "mixer output")


def _expert(sizes: Sizes) -> list[Collective]:
    """``MoELayer``: routing, dispatch, combine, and the shared expert beside them."""
    shared = []
    if sizes.shared_expert_width:
        shared = column_parallel(sizes, "shared expert's input")
        shared += row_parallel(sizes, "shared expert's output")
    dispatch = {"alltoall": _all_to_all_dispatch, "allgather": _all_gather_dispatch}[
        sizes.config.moe_token_dispatcher_type
    ]
    made = [*shared, *_capacity(sizes), *dispatch(sizes)]
    if sizes.recomputes("moe"):
        # Megatron leaves the auxiliary losses out of the pass that keeps nothing.
        made += again(made)
    elif sizes.recomputes("shared_experts"):
        made += again(shared)
    return made + _auxiliary_losses(sizes)


def _auxiliary_losses(sizes: Sizes) -> list[Collective]:
    """The counts that balancing losses need, of the tokens that the ranks of a group hold."""
    kinds, coefficients = (
        sizes.config.moe_router_load_balancing_type,
        sizes.config.moe_aux_loss_coeff,
    )
    kinds = kinds if isinstance(kinds, list) else [kinds]
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients] * len(kinds)
    rows_counted = {"aux_loss": 1, "seq_aux_loss": sizes.batch}
    made = []
    for kind, coefficient in zip(kinds, coefficients, strict=True):
        if kind in rows_counted and coefficient:
            size = rows_counted[kind] * sizes.experts * 8
            made.append(
                Collective("all_reduce", "tp-cp", size, "forward", "routing", "tokens per expert")
            )
    return made


def _capacity(sizes: Sizes) -> list[Collective]:
    """The probabilities of a whole microbatch, from which a capacity drops the least."""
    if sizes.config.moe_expert_capacity_factor is None:
        return []
    size = sizes.tokens * sizes.layout.cp * sizes.experts * sizes.router_bytes
    return [
        Collective("all_gather", "tp-cp", size, "forward", "routing", "probabilities, for capacity")
    ]


def _all_to_all_dispatch(sizes: Sizes) -> list[Collective]:
    """``MoEAlltoAllTokenDispatcher``: token copies to the ranks of their experts and back."""
    rows, layout = sizes.shared_tokens * sizes.topk, sizes.layout
    metadata = sizes.experts * 8 * layout.etp * layout.ep
    tokens, probabilities = rows * sizes.h * sizes.e, rows * sizes.router_bytes
    made = [
        Collective("all_gather", "etp-ep", metadata, "forward", "routing", "tokens per expert"),
    ]
    for what, size in (("token copies", tokens), ("probabilities", probabilities)):
        made += there_and_back("all_to_all", "all_to_all", "ep", size, "dispatch", what)
        made += there_and_back(
            "all_gather", "reduce_scatter", "etp", size * layout.etp, "gather boundary", what
        )
    made += there_and_back(
        "reduce_scatter", "all_gather", "etp", tokens * layout.etp, "sum", "expert outputs"
    )
    made += there_and_back("all_to_all", "all_to_all", "ep", tokens, "dispatch", "expert outputs")
    return made


def _all_gather_dispatch(sizes: Sizes) -> list[Collective]:
    """``MoEAllGatherTokenDispatcher``: every rank sees every token and keeps its experts'."""
    ranks = sizes.layout.etp * sizes.layout.ep
    rows = sizes.shared_tokens * ranks
    wanted = rows * sizes.experts
    return [
        Collective("all_gather", "etp-ep", wanted, "forward", "routing", "routing map"),
        *there_and_back(
            "all_gather",
            "reduce_scatter",
            "etp-ep",
            wanted * sizes.router_bytes,
            "routing",
            "probabilities",
        ),
        *there_and_back(
            "all_gather",
            "reduce_scatter",
            "etp-ep",
            rows * sizes.h * sizes.e,
            "dispatch",
            "tokens",
        ),
        *there_and_back(
            "reduce_scatter",
            "all_gather",
            "etp-ep",
            rows * sizes.h * sizes.router_bytes,
            "dispatch",
            "expert outputs",
        ),
    ]


def _exchange(sizes: Sizes, width: int, what: str) -> list[Collective]:
    """An all-to-all over cp of ``width`` channels of this rank's tokens."""
    size = sizes.tokens * width * sizes.e
    return there_and_back("all_to_all", "all_to_all", "cp", size, "layout transition", what)


def _handed_on(size: int, what: str) -> list[Collective]:
    """A state passed from segment to segment, and its gradient back; the ends have one side."""
    gradient = f"gradient of the {what}"
    return [
        Collective("receive", "cp", size, "forward", "hand-over", what, neighbour=-1),
        Collective("send", "cp", size, "forward", "hand-over", what, neighbour=1),
        Collective("receive", "cp", size, "backward", "hand-over", gradient, neighbour=1),
        Collective("send", "cp", size, "backward", "hand-over", gradient, neighbour=-1),
    ]
