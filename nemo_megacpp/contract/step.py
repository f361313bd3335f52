"""What a whole step of one rank sends: for its layers, the pipeline and the optimizer.

The order of a pipeline's messages is Megatron's; their number and size follow from the chunks. The
step is Megatron's own, without overlap of gradient or parameter exchange: overlapping moves
collectives in time and cuts them into buckets, and changes no byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from nemo_megacpp.contract.buffers import (
    GRADIENT_BYTES,
    Buffer,
    buffers_of,
    summed_over_tp,
)
from nemo_megacpp.contract.build import BuiltStage
from nemo_megacpp.contract.communication import (
    block_collectives,
    embedding_collectives,
    head_collectives,
)
from nemo_megacpp.formulas.collectives import Collective, Kind, Role, between_several
from nemo_megacpp.formulas.placement import group_of
from nemo_megacpp.formulas.sizes import Sizes
from nemo_megacpp.pattern import Family


class Message(NamedTuple):
    """A collective between given ranks. For a send or a receive, ``ranks`` are this and the other.

    Fields as in :class:`nemo_megacpp.formulas.collectives.Collective`; bytes of one call.
    """

    kind: str
    ranks: tuple[int, ...]
    bytes: int


def layer_collectives(sizes: Sizes, stage: BuiltStage) -> list[tuple[str, int, list[Collective]]]:
    """Return ``(place, how many, collectives of one of them in one microbatch)`` for a stage.

    A place is a family's letter, ``embedding``, ``head`` or ``pipeline``.
    """
    letters = "".join(chunk.letters for chunk in stage.chunks)
    places = [
        (letter, letters.count(letter), block_collectives(sizes, Family(letter)))
        for letter in dict.fromkeys(letters)
    ]
    if any(chunk.owns_embedding for chunk in stage.chunks):
        places.insert(0, ("embedding", 1, embedding_collectives(sizes)))
    if any(chunk.owns_head for chunk in stage.chunks):
        places.append(("head", 1, head_collectives(sizes)))
    if sizes.layout.pp > 1:
        places.append(("pipeline", 1, pipeline_messages(sizes, stage)))
    return places


def pipeline_messages(sizes: Sizes, stage: BuiltStage) -> list[Collective]:
    """Return what a stage sends and receives for one microbatch, over all its chunks."""
    size = sizes.shared_tokens * sizes.h * sizes.e
    messages: list[Collective] = []

    def between(chunk: int, outgoing: bool) -> None:
        """The hidden states of ``chunk``, sent to the next stage or received from the last one,
        and their gradient, which goes the other way."""
        there: Kind = "send" if outgoing else "receive"
        back: Kind = "receive" if outgoing else "send"
        step, what = (1 if outgoing else -1), f"hidden states of chunk {chunk}"
        messages.append(Collective(there, "pp", size, "forward", "pipeline", what, 1, step))
        what = f"gradient of {what}"
        messages.append(Collective(back, "pp", size, "backward", "pipeline", what, 1, step))

    for chunk in stage.chunks:
        if not chunk.owns_embedding:
            between(chunk.index - 1, outgoing=False)
        if not chunk.owns_head:
            between(chunk.index, outgoing=True)
    return messages


def step_collectives(
    sizes: Sizes,
    stage: BuiltStage,
    model_has_experts: bool,
    buffers: Sequence[Buffer] | None = None,
) -> list[Collective]:
    """Return what a rank of ``stage`` sends once per step: gradients, parameters, norms.

    ``buffers`` are the stage's gradient buffers, where the caller has them already.
    """
    job, layout = sizes.job, sizes.layout
    made: list[Collective] = []

    def once(kind: Kind, group: str, size: int, role: Role, what: str, count: int = 1) -> None:
        made.append(Collective(kind, group, size, "step", role, what, count))

    optimizers = 2 if model_has_experts else 1
    for buffer in buffers_of(job, stage) if buffers is None else buffers:
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
            # Each of Megatron's two optimizers, of dense and of expert parameters, gathers the
            # whole chunk when it is done.
            size = bucket.numel * buffer.element_size
            once("all_gather", buffer.group, size, "parameter", where, optimizers)
    once(
        "all_reduce",
        "tp",
        summed_over_tp(job, list(stage.parameters)) * GRADIENT_BYTES,
        "gradient",
        "gradients of parameters that tp ranks use for their own tokens or heads",
    )
    letters = "".join(chunk.letters for chunk in stage.chunks)
    blocks = letters.count(Family.EXPERT.value)
    if blocks and sizes.config.moe_router_enable_expert_bias:
        size = blocks * sizes.experts * 4  # float32 whatever the model is
        once("all_reduce", "tp-cp-dp", size, "routing", "tokens per expert, for the router's bias")
    if job.use_distributed_optimizer:
        once("all_reduce", "world", 4, "sum", "gradient norm")
    else:
        once("all_reduce", "tp-pp", 4, "sum", "gradient norm of dense parameters")
        if model_has_experts:
            once("all_reduce", "etp-ep-pp", 4, "sum", "gradient norm of expert parameters")
    made = between_several(sizes, made)
    return made + _tied_embedding(sizes, stage) if layout.pp > 1 else made


def _tied_embedding(sizes: Sizes, stage: BuiltStage) -> list[Collective]:
    """The gradient of an embedding that the last stage uses as its head."""
    ends = any(chunk.owns_embedding or chunk.owns_head for chunk in stage.chunks)
    if not (ends and sizes.config.share_embeddings_and_output_weights):
        return []
    size = sizes.vocabulary * sizes.h * GRADIENT_BYTES
    what = "gradient of the embedding that is the head"
    return [Collective("all_reduce", "embedding", size, "step", "gradient", what)]


def messages_of_rank(
    sizes: Sizes,
    stage: BuiltStage,
    model_has_experts: bool,
    rank: int,
    carried_out: Callable[[Collective], Collective] = lambda collective: collective,
) -> Counter[Message]:
    """Return everything that ``rank`` of ``stage`` sends in one step, between whom, and how often.

    Args:
        sizes, stage, model_has_experts: the job, and the rank's stage of it.
        rank: a global rank on that stage.
        carried_out: what a machine makes of a collective that its backend does not have.
    """
    layout, found = sizes.layout, Counter[Message]()

    @cache
    def ranks_of(group: str) -> tuple[int, ...]:
        if group == "embedding":
            stages = group_of(layout, rank, "pp")
            return (stages[0], stages[-1])
        return group_of(layout, rank, group)

    def add(collectives: Iterable[Collective], times: int) -> None:
        for made in map(carried_out, collectives):
            ranks = ranks_of(made.group)
            if made.neighbour:
                place = ranks.index(rank) + made.neighbour
                if made.group == "cp" and made.role == "hand-over" and not 0 <= place < len(ranks):
                    continue
                ranks = (rank, ranks[place % len(ranks)])
            found[Message(made.kind, ranks, made.bytes)] += made.count * times

    for _, layers, collectives in layer_collectives(sizes, stage):
        add(collectives, layers * sizes.job.num_microbatches)
    add(step_collectives(sizes, stage, model_has_experts), 1)
    return found


def whole_step(sizes: Sizes, stage: BuiltStage, model_has_experts: bool) -> Sequence[Collective]:
    """Return a stage's collectives of a step, each with its count over layers and microbatches."""
    total = [
        replace(made, count=made.count * layers * sizes.job.num_microbatches)
        for _, layers, collectives in layer_collectives(sizes, stage)
        for made in collectives
    ]
    return [*total, *step_collectives(sizes, stage, model_has_experts)]
