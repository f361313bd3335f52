"""How much each part of a model computes: the weights of pipeline cuts, and a step's model FLOPs.

Unit: floating-point operations of the forward pass, for one token, in the whole model. Counted are
two operations for each weight that a token meets (of the routed experts the share that it is sent
to), and the mixing of tokens: attention as causal, hence over half of the sequence. What takes time
without arithmetic is not counted: norms, routing, communication, and the wait of R's recurrence,
whose steps follow one another.

A backward pass takes twice the operations of the forward pass, so a step takes three times as many
for each of its tokens. Activations that are recomputed do not count again, and neither do the
boundaries of packed documents. This is the convention of Megatron's
``num_floating_point_operations`` (``megatron/training/training.py``) and of NeMo's
``nemo.utils.flops_formulas``; both leave out routers and causal convolutions, approximate the scan
of Mamba, and know no Mamba-3 and no R.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.contract.stages import BuiltChunk, BuiltParameter
from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.sizes import PREDICTION, Job, Sizes
from nemo_megacpp.pattern import Family

FORWARD_AND_BACKWARD = 3
"""Operations of a step per operation of its forward pass: gradients of inputs and of weights."""


def work_of(sizes: Sizes, places: Mapping[str, Sequence[BuiltParameter]]) -> dict[str, int]:
    """Return the operations of the forward pass, for one token, of each place.

    Args:
        sizes: of the model on one rank, without any parallelism.
        places: the parameters of one layer of each family, by letter, of ``embedding`` and of
            ``head``.
    """
    work = {
        letter: _matrices(sizes, places[letter]) + _mixing(sizes, letter)
        for letter in sizes.places
        if len(letter) == 1
    }
    # The look-up: one addition per element of its gradient.
    work |= {"embedding": sizes.h, "head": _head(sizes, places["head"])}
    if sizes.prediction:
        work[PREDICTION] = sizes.h + _matrices(sizes, places[PREDICTION]) + work["head"]
    return work


def one_depth(chunk: BuiltChunk) -> list[BuiltParameter]:
    """Return the parameters of the first prediction depth of a chunk, beside its layers."""
    return [p for p in chunk.of_end(PREDICTION) if p.name.startswith("mtp.layers.0.")]


def step_operations(config: HybridConfig, chunks: Iterable[BuiltChunk], tokens: int) -> int:
    """Return the model FLOPs that the chunks of a rank contribute to a step of the whole job.

    The sum over the ranks of one pipeline is that of the whole model, in every layout: TP, CP, EP
    and DP divide the work of a chunk among ranks, and it is counted whole.

    Args:
        config: of the model, in its layout.
        chunks: what the rank has built.
        tokens: of the global batch.
    """
    whole = Sizes(Job({}), config)  # a job without parallelism
    total = 0
    for chunk in chunks:
        inside = [p for p in chunk.parameters if p.layer is not None]
        total += _matrices(whole, inside) + sum(_mixing(whole, c) for c in chunk.all_letters)
        total += _matrices(whole, chunk.of_end(PREDICTION))
        if chunk.owns_head:  # each depth computes it too
            total += _head(whole, chunk.of_end("head")) * (1 + chunk.depths)
    return FORWARD_AND_BACKWARD * tokens * total


def _head(sizes: Sizes, parameters: Sequence[BuiltParameter]) -> int:
    if sizes.config.share_embeddings_and_output_weights:
        return 2 * sizes.vocabulary * sizes.h
    return _matrices(sizes, parameters)


def _matrices(sizes: Sizes, parameters: Sequence[BuiltParameter]) -> int:
    # A look-up in a table of side channels is no product; their projection is.
    tables = {p for p in parameters if p.is_side_channel and ".tables." in p.name}
    matrices = [p for p in parameters if len(p.global_shape) > 1 and p not in tables]
    dense = sum(math.prod(p.global_shape) for p in matrices if not p.is_expert)
    # The first axis of an expert's parameter is that of the experts, of which a rank has 1 / EP.
    experts = sum(p.local_shape[0] * math.prod(p.global_shape[1:]) for p in matrices if p.is_expert)
    routed = experts * sizes.config.expert_model_parallel_size * sizes.topk
    return 2 * dense + (2 * routed // sizes.experts if routed else 0)


def _mixing(sizes: Sizes, letter: str) -> int:
    """Operations between tokens, and on states."""
    mixing = block_of(Family(letter)).mixing
    return 0 if mixing is None else mixing(sizes)
