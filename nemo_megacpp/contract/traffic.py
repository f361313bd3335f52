"""What a rank sends: for a layer, for the pipeline, once per step, and in total.

Families declare their collectives; those of the embedding, the head, the pipeline and the optimizer
are here. The order of a pipeline's messages is Megatron's; their number and size follow from the
chunks. The step is Megatron's own, without overlap of gradient or parameter exchange: overlapping
moves collectives in time and cuts them into buckets, and changes no byte. The tests compare all of
it with recorded runs, collective by collective and byte by byte.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nemo_megacpp.contract.memory import GRADIENT_BYTES, Buffer
from nemo_megacpp.contract.recompute import recomputed_layers
from nemo_megacpp.contract.stages import BuiltStage
from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.collectives import (
    Collective,
    Kind,
    Role,
    again,
    between_several,
    column_parallel,
    there_and_back,
)
from nemo_megacpp.formulas.prediction import prediction_collectives
from nemo_megacpp.formulas.side_channels import channel_collectives
from nemo_megacpp.formulas.sizes import PREDICTION, Sizes
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.layout.placement import EMBEDDING, group_of, group_size
from nemo_megacpp.pattern import Family
from nemo_megacpp.side_channels import channel_places, is_channel_place
from nemo_megacpp.specs.payload import (
    DEPTH_STATE,
    SHAPE_BYTES,
    declared,
    payload_at,
    sends_shapes,
)
from nemo_megacpp.specs.recurrent import depth_state_handed_on, depth_state_taken


def place_collectives(sizes: Sizes, place: str) -> list[Collective]:
    """Return what one layer of a family, the embedding, the head or a prediction depth beside its
    layers sends in one microbatch."""
    if place == "embedding":  # split over the vocabulary
        size, what = sizes.hidden_bytes, "embeddings of the rank's part of the vocabulary"
        made = (
            there_and_back("reduce_scatter", "all_gather", "tp", size, "sum", what)
            if sizes.layout.sp
            else [Collective("all_reduce", "tp", size, "forward", "sum", what)]
        )
    elif place == "head":  # with the cross entropy, split over the vocabulary, in float32
        made = column_parallel(sizes, "final hidden states") + [
            Collective("all_reduce", "tp", sizes.tokens * 4, "forward", "sum", f"{what} per token")
            for what in ("largest logit", "target's logit", "sum of exponentials")
        ]
    elif place == PREDICTION:
        ends = (place_collectives(sizes, end) for end in ("embedding", "head"))
        made = prediction_collectives(sizes, *ends)
    elif is_channel_place(place):
        made = channel_collectives(sizes, place)
    else:
        formula = block_of(Family(place)).collectives
        assert formula is not None, "a job refuses a family without formulas"
        made = formula(sizes)
    return between_several(sizes, made)


def microbatch_collectives(
    sizes: Sizes, stages: Sequence[BuiltStage]
) -> list[tuple[str, int, list[Collective]]]:
    """Return ``(place, how many, collectives of one)`` in one microbatch, for one rank of each
    stage together. The place ``pipeline`` is what passes between stages; of a place whose layers
    are recomputed in part, those that are come first."""
    counts = Counter(place for stage in stages for place in stage.places)
    whole: Counter[str] = Counter()
    declared = sizes.config.side_channels
    for chunk in (chunk for stage in stages for chunk in stage.chunks):
        recomputed = recomputed_layers(sizes, chunk.letters)
        whole.update(recomputed)
        whole.update(filter(None, channel_places(declared, chunk.layers[: len(recomputed)])))
        counts.update(filter(None, channel_places(declared, chunk.owners)))
    found = []
    for place in sizes.places:
        made = place_collectives(sizes, place)
        for layers, collectives in (
            (whole[place], made + again(made)),
            (counts[place] - whole[place], made),
        ):
            if layers:
                found.append((place, layers, collectives))
    handed = [made for stage in stages for made in depth_state_collectives(sizes, stage)]
    if handed:
        found.append(("depth state", 1, handed))
    if sizes.layout.pp > 1:
        messages = [made for stage in stages for made in pipeline_messages(sizes, stage)]
        found.append(("pipeline", 1, messages))
    return found


def pipeline_messages(sizes: Sizes, stage: BuiltStage) -> list[Collective]:
    """Return what all chunks of a stage send to and receive from others for one microbatch."""
    messages: list[Collective] = []
    letters, config = sizes.letters, sizes.config
    with_shapes = sends_shapes(letters, config, config)
    tokens = sizes.shared_tokens // sizes.batch

    def between(chunk: int, cut: int, outgoing: bool) -> None:
        """The payload of ``chunk``, sent to the next stage or received from the last one, and its
        gradient, which goes the other way."""
        payload = payload_at(cut, letters, config, config)
        size = math.prod(payload.shape(tokens, sizes.batch)) * sizes.e
        there: Kind = "send" if outgoing else "receive"
        back: Kind = "receive" if outgoing else "send"
        names = ", ".join(["hidden states", *(item.name for item in payload.items)])
        step, what = (1 if outgoing else -1), f"{names} of chunk {chunk}"
        forward = Collective(there, "pp", size, "forward", "pipeline", what, 1, step)
        what = f"gradient of {what}"
        backward = Collective(back, "pp", size, "backward", "pipeline", what, 1, step)
        for message in (forward, backward):
            messages.append(message)
            if with_shapes:
                what = f"shape of {message.what}"
                messages.append(replace(message, bytes=SHAPE_BYTES, what=what))

    for chunk in stage.chunks:
        if not chunk.owns_embedding:
            between(chunk.index - 1, chunk.layers.start, outgoing=False)
        if not chunk.owns_head:
            between(chunk.index, chunk.layers.stop, outgoing=True)
    return messages


def depth_state_collectives(sizes: Sizes, stage: BuiltStage) -> list[Collective]:
    """Return what the R blocks of a stage make of the state that they hand on in depth, in one
    microbatch: the first of the model takes none, and the last hands none on."""
    state = next(
        (d for d in declared(sizes.letters, sizes.config) if d.item.name == DEPTH_STATE), None
    )
    if state is None:
        return []
    found: list[Collective] = []
    taken, handed_on = depth_state_of(sizes)
    for chunk in stage.chunks:
        whole = len(recomputed_layers(sizes, chunk.letters))
        for place, (layer, letter) in enumerate(zip(chunk.layers, chunk.letters, strict=True)):
            if letter != Family.RECURRENT.value:
                continue
            made = [
                *(taken if layer > state.first else ()),
                *(handed_on if layer < state.last else ()),
            ]
            found += made
            if place < whole or sizes.recomputes("m2rnn"):
                found += again(made)
    return found


def depth_state_of(sizes: Sizes) -> tuple[list[Collective], list[Collective]]:
    """Return what an R block makes, in one microbatch, of the state that it takes and of the one
    that it hands on in depth; nothing where the model hands on none."""
    if not declared(sizes.letters, sizes.config):
        return [], []
    taken, handed_on = depth_state_taken(sizes), depth_state_handed_on(sizes)
    return between_several(sizes, taken), between_several(sizes, handed_on)


def step_collectives(
    sizes: Sizes, stage: BuiltStage, buffers: Sequence[Buffer]
) -> list[Collective]:
    """Return what a rank of ``stage`` sends once per step: gradients, parameters, norms."""
    job, layout = sizes.job, sizes.layout
    made: list[Collective] = []

    def once(kind: Kind, group: str, size: int, role: Role, what: str, count: int = 1) -> None:
        made.append(Collective(kind, group, size, "step", role, what, count))

    has_experts = sizes.has(Family.EXPERT)
    for buffer in buffers:
        kinds = "expert" if buffer.is_expert else "dense"
        if buffer.element_size != sizes.e:
            kinds += " float32"
        where = f"{kinds} parameters of chunk {buffer.chunk}"
        for bucket in buffer.buckets:
            gradients = bucket.numel * GRADIENT_BYTES
            if not job.use_distributed_optimizer:
                once("all_reduce", buffer.group, gradients, "gradient", f"gradients of {where}")
                continue
            once("reduce_scatter", buffer.group, gradients, "gradient", f"gradients of {where}")
            # After the step each of Megatron's two optimizers, of dense and of expert parameters,
            # gathers the whole chunk; in the forward pass it is gathered once.
            size = bucket.numel * buffer.element_size
            times = 1 if job.overlap_param_gather else 1 + has_experts
            once("all_gather", buffer.group, size, "parameter", where, times)
    if layout.sp:
        size = sum(p.numel for p in stage.parameters if p.sequence_parallel) * GRADIENT_BYTES
        what = "gradients of parameters that tp ranks use for their own tokens or heads"
        once("all_reduce", "tp", size, "gradient", what)
    blocks = stage.places.count(Family.EXPERT.value)
    if blocks and sizes.config.moe_router_enable_expert_bias:
        size = blocks * sizes.experts * 4  # float32 whatever the model is
        once("all_reduce", "tp-cp-dp", size, "routing", "tokens per expert, for the router's bias")
    if job.use_distributed_optimizer:
        once("all_reduce", "world", 4, "sum", "gradient norm")
    else:
        once("all_reduce", "tp-pp", 4, "sum", "gradient norm of dense parameters")
        if has_experts:
            once("all_reduce", "etp-ep-pp", 4, "sum", "gradient norm of expert parameters")
    copied = sizes.config.share_embeddings_and_output_weights or sizes.prediction
    if copied and {"embedding", "head"} & {*stage.places}:
        size = sizes.vocabulary * sizes.h * GRADIENT_BYTES
        what = "gradient of the embedding that is the head"
        if sizes.prediction:
            what = "gradient of the embedding that prediction depths have a copy of"
        once("all_reduce", EMBEDDING, size, "gradient", what)
    return between_several(sizes, made)


def whole_step(
    sizes: Sizes, stages: Sequence[BuiltStage], buffers: Sequence[Sequence[Buffer]]
) -> list[Collective]:
    """Return everything that one rank of each stage sends in a step; ``buffers`` by stage."""
    repeated = [
        replace(made, count=made.count * layers * sizes.job.num_microbatches)
        for _, layers, collectives in microbatch_collectives(sizes, stages)
        for made in collectives
    ]
    for stage, mine in zip(stages, buffers, strict=True):
        repeated += step_collectives(sizes, stage, mine)
    return repeated


@dataclass(frozen=True)
class Traffic:
    """What a rank sends over one kind of group in one step.

    Attributes:
        group: a key of :data:`nemo_megacpp.layout.placement.GROUPS`.
        calls: collectives, and messages sent.
        tensor_bytes: of the tensors that are passed to them.
        sent_bytes: that leave the rank, in a ring (or direct) algorithm.
        between_nodes: the part of ``sent_bytes`` that leaves the node, averaged over the group.
    """

    group: str
    calls: int
    tensor_bytes: int
    sent_bytes: int
    between_nodes: int


def traffic(
    layout: ParallelLayout, collectives: Iterable[Collective], rank: int, gpus_per_node: int
) -> list[Traffic]:
    """Return the totals of ``rank``'s collectives, by group, largest first."""
    totals: dict[str, list[float]] = {}
    crossing: dict[tuple[str, bool], float] = {}
    for made in collectives:
        if made.kind == "receive":
            continue  # counted where it is sent
        key = (made.group, made.kind == "all_to_all")
        if key not in crossing:
            nodes = [other // gpus_per_node for other in group_of(layout, rank, made.group)]
            crossing[key] = _leaves_node(nodes, made.kind == "all_to_all")
        sent = made.wire_bytes(group_size(layout, made.group))
        entry = totals.setdefault(made.group, [0.0, 0.0, 0.0, 0.0])
        entry[0] += made.count
        entry[1] += made.bytes * made.count
        entry[2] += sent
        entry[3] += sent * crossing[key]
    found = [Traffic(group, *map(round, values)) for group, values in totals.items()]
    return sorted(found, key=lambda item: -item.sent_bytes)


def _leaves_node(nodes: list[int], all_to_all: bool) -> float:
    """Return the share of the bytes that a group's ranks, on ``nodes``, send to another node.

    A ring passes through its ranks in order; an all-to-all sends as much to each rank.
    """
    size = len(nodes)
    if size == 1:
        return 0.0
    if not all_to_all:
        return sum(nodes[i] != nodes[(i + 1) % size] for i in range(size)) / size
    return 1 - sum(count * (count - 1) for count in Counter(nodes).values()) / (size * (size - 1))
