"""What a layout costs beyond bytes: what it forces on, turns off, repeats or leaves idle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nemo_megacpp.contract.build import BuiltStage
from nemo_megacpp.formulas.placement import group_facts, group_size
from nemo_megacpp.formulas.saved import COUNTED_RECOMPUTATION
from nemo_megacpp.formulas.sizes import Sizes
from nemo_megacpp.mixers.kernels.mamba3_gpu import mamba3_gpu_reason
from nemo_megacpp.pattern import Family, known_families


class Cost(NamedTuple):
    """One consequence.

    Attributes:
        axis: what causes it: ``TP``, ``CP``, … or ``MODEL``.
        effect: ``forces``, ``turns off``, ``repeats``, ``waits`` or ``bubble``.
        message: what happens, with the numbers.
    """

    axis: str
    effect: str
    message: str


def costs(sizes: Sizes, stages: Sequence[BuiltStage]) -> list[Cost]:
    """Return what the job's layout costs; empty for one rank without padding."""
    found: list[Cost] = []
    for rule in (_tensor, _context, _experts, _pipeline, _optimizer, _kernels, _nodes):
        found += rule(sizes, stages)
    return found


def _has(sizes: Sizes, family: Family) -> bool:
    return family in sizes.config.pattern.families


def _tensor(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    layout, config = sizes.layout, sizes.config
    padding = sizes.vocabulary * layout.tp - config.vocab_size
    if padding:
        yield Cost(
            "TP",
            "forces",
            f"{padding} rows of padding in embedding and head: {config.vocab_size} tokens are no "
            f"multiple of {config.make_vocab_size_divisible_by} and of TP {layout.tp}",
        )
    if layout.tp > 1 and layout.sp and _has(sizes, Family.EXPERT):
        yield Cost("TP", "forces", "SP: Megatron's MoE layer trains at TP > 1 with SP only")
    if layout.tp > 1 and not layout.sp:
        yield Cost(
            "SP",
            "repeats",
            f"norms, residuals and their activations on all {layout.tp} tp ranks: SP is off",
        )
    if layout.tp > 1 and _has(sizes, Family.RECURRENT):
        yield Cost(
            "TP",
            "repeats",
            f"R's q and k (2 x {sizes.m2rnn.key_head_dim} rows, shared by all heads) on every tp "
            f"rank, and a sum of one number per token over tp for its norm",
        )


def _context(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    layout, cp = sizes.layout, sizes.layout.cp
    if cp == 1:
        return
    yield Cost(
        "CP",
        "forces",
        f"every document of a packed row to be padded to a multiple of {2 * cp} tokens",
    )
    if _has(sizes, Family.ATTENTION):
        yield Cost(
            "CP",
            "forces",
            f"a ring of {cp - 1} exchanges of K and V in A (Transformer Engine; by formula)"
            if sizes.job.kernels == "gpu"
            else "K and V of the whole sequence on every cp rank in A (torch kernels)",
        )
    if _has(sizes, Family.RECURRENT):
        heads = sizes.m2rnn_heads
        yield (
            Cost(
                "CP",
                "waits",
                f"in R, whose {cp} segments hand their state on and run one after another: "
                f"{heads} heads of a tp rank do not divide by {cp}, or 'serial' was asked for",
            )
            if sizes.m2rnn_is_serial
            else Cost("CP", "forces", f"R to spread the {heads} heads of a tp rank over cp")
        )
    if _has(sizes, Family.MAMBA):
        groups = int(sizes.config.mamba_num_groups) // layout.tp
        if groups < cp:
            yield Cost(
                "CP",
                "repeats",
                f"B and C of each M group on {cp // groups} cp ranks: {groups} groups of a tp rank "
                f"are shared out over CP {cp}",
            )


def _experts(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    layout = sizes.layout
    if not _has(sizes, Family.EXPERT):
        return
    if layout.etp > 1:
        yield Cost(
            "ETP",
            "repeats",
            f"every token copy on {layout.etp} ranks: they gather the tokens that they split "
            f"each expert's matrices for",
        )
    if layout.ep > 1:
        yield Cost(
            "EP",
            "waits",
            "for the rank whose experts get most tokens: the bytes given are for balanced routing",
        )
    if layout.etp != layout.tp:
        yield Cost(
            "ETP",
            "forces",
            f"expert gradients over groups of their own: {layout.expert_data_parallel_size} "
            f"replicas of an expert, {layout.data_parallel_size * layout.cp} of a dense layer",
        )


def _pipeline(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    layout, job = sizes.layout, sizes.job
    if layout.pp == 1:
        return
    microbatches, chunks = job.num_microbatches, layout.vpp or 1
    bubble = (layout.pp - 1) / (chunks * microbatches)
    yield Cost(
        "PP",
        "bubble",
        f"of {bubble:.0%} (PP={layout.pp}, {microbatches} microbatches"
        + (f", {chunks} chunks a stage)" if chunks > 1 else ")"),
    )
    letters = ["".join(chunk.letters for chunk in stage.chunks) for stage in stages]
    for family in known_families():
        counts = [text.count(family.value) for text in letters]
        if max(counts) != min(counts):
            yield Cost(
                "PP",
                "waits",
                f"for the stage with most {family.value} blocks: {min(counts)} to {max(counts)} "
                f"per stage",
            )
    if layout.vpp is not None and layout.pp == 2:
        yield Cost(
            "VPP",
            "forces",
            "sends and receives one by one, overlapped (overlap_p2p_comm on, batch_p2p_comm off): "
            "two stages would mistake each other's messages in one batch",
        )


def _optimizer(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    job, replicas = sizes.job, group_size(sizes.layout, "dp-cp")
    if replicas > 1 and not job.use_distributed_optimizer:
        yield Cost(
            "DP",
            "repeats",
            f"the optimizer's state on all {replicas} replicas: use_distributed_optimizer=true "
            f"shares it out",
        )
    if replicas > 1 and job.use_distributed_optimizer and _has(sizes, Family.EXPERT):
        yield Cost(
            "DP",
            "repeats",
            "the gathering of parameters: Megatron's dense and its expert optimizer each gather "
            "all of a chunk, unless overlap_param_gather is on",
        )


def _kernels(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    if _has(sizes, Family.RECURRENT) and not sizes.m2rnn_in_triton:
        yield Cost(
            "MODEL",
            "forces",
            "R to keep the state after every token for its backward pass (torch kernel)",
        )
    if sizes.config.recompute_granularity == "selective":
        again = ", ".join(sizes.config.recompute_modules)
        left = sorted(set(sizes.config.recompute_modules) - COUNTED_RECOMPUTATION)
        yield Cost(
            "MODEL",
            "repeats",
            f"in the backward pass: {again}"
            + (f"; what {', '.join(left)} saves is not taken off the activations" if left else ""),
        )
    if sizes.config.mode == "mamba3" and _has(sizes, Family.MAMBA):
        reason = mamba3_gpu_reason(sizes.mamba3, dtype=sizes.config.params_dtype)
        if reason is not None or sizes.config.mamba3_kernel == "torch":
            why = f", which {reason}" if reason else ": mamba3_kernel is 'torch'"
            yield Cost("MODEL", "turns off", f"mamba_ssm's Triton kernel for Mamba-3{why}")


def _nodes(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    gpus = sizes.job.gpus_per_node
    for group in ("cp", "ep", "pp"):
        facts = group_facts(sizes.layout, group, gpus)
        if facts.nodes > 1 and (group != "ep" or _has(sizes, Family.EXPERT)):
            yield Cost(
                group.upper(),
                "forces",
                f"traffic between nodes: a group of {facts.size} spans up to {facts.nodes} nodes "
                f"of {gpus}",
            )
