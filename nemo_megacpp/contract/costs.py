"""What a layout costs beyond bytes: what it requires, turns off, repeats or leaves idle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nemo_megacpp.contract.recompute import recomputed_share
from nemo_megacpp.contract.stage_cuts import stage_cuts
from nemo_megacpp.contract.stages import BuiltStage
from nemo_megacpp.formulas.recompute import described
from nemo_megacpp.formulas.sizes import Sizes
from nemo_megacpp.layout.placement import group_facts, group_size
from nemo_megacpp.mixers.kernels.m2rnn_scan import CHECKPOINT_EVERY
from nemo_megacpp.mixers.kernels.mamba3_gpu import mamba3_gpu_reason
from nemo_megacpp.pattern import Family, known_families
from nemo_megacpp.render import show_bytes
from nemo_megacpp.specs.payload import SHAPE_BYTES, sends_shapes


class Cost(NamedTuple):
    """One consequence.

    Attributes:
        axis: what causes it: ``TP``, ``CP``, … or ``MODEL``.
        effect: ``forces``, ``turns off``, ``repeats``, ``waits`` or ``bubble``.
        message: one line: its name, the number, and the reason in brackets.
    """

    axis: str
    effect: str
    message: str


def costs(sizes: Sizes, stages: Sequence[BuiltStage]) -> list[Cost]:
    """Return what the job's layout costs; empty for one rank without padding."""
    rules = (_tensor, _context, _experts, _pipeline, _optimizer, _kernels, _nodes)
    return [cost for rule in rules for cost in rule(sizes, stages)]


def bubble_of(sizes: Sizes) -> float:
    """Return the idle time of the pipeline, as a share of the work."""
    layout = sizes.layout
    return (layout.pp - 1) / ((layout.vpp or 1) * sizes.job.num_microbatches)


def _tensor(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    layout, config = sizes.layout, sizes.config
    padding = sizes.vocabulary * layout.tp - config.vocab_size
    if padding:
        text = (
            f"Vocabulary padding: {padding} rows in embedding and head ({config.vocab_size} "
            f"tokens, padded to a multiple of {config.make_vocab_size_divisible_by} and of "
            f"TP={layout.tp})"
        )
        yield Cost("TP", "forces", text)
    if layout.tp > 1 and layout.sp and sizes.has(Family.EXPERT):
        text = "Sequence parallelism: required (Megatron's MoE layer trains at TP > 1 only with SP)"
        yield Cost("TP", "forces", text)
    if layout.tp > 1 and not layout.sp:
        text = (
            f"Repeated norms and residuals: on all {layout.tp} TP ranks, with their activations "
            f"(SP is off)"
        )
        yield Cost("SP", "repeats", text)
    if layout.tp > 1 and sizes.has(Family.RECURRENT):
        text = (
            f"Repeated q and k of R: 2 x {sizes.m2rnn.key_head_dim} rows on every TP rank (shared "
            f"by all heads; its norm also sums one number per token over TP)"
        )
        yield Cost("TP", "repeats", text)


def _context(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    layout, cp = sizes.layout, sizes.layout.cp
    if cp == 1:
        return
    text = f"Document padding: to a multiple of {2 * cp} tokens in packed rows (CP={cp})"
    yield Cost("CP", "forces", text)
    if sizes.has(Family.ATTENTION):
        text = {
            "p2p": f"Ring attention in A: {cp - 1} exchanges of K and V (CP={cp})",
            "all_gather": f"Gathered K and V in A: the whole sequence on every CP rank (CP={cp})",
            "a2a": f"Heads of A over CP: {sizes.kv_heads} KV heads per TP rank (CP={cp})",
        }[sizes.cp_comm_type]
        yield Cost("CP", "forces", text)
    if sizes.has(Family.RECURRENT):
        heads = sizes.m2rnn_heads
        if sizes.m2rnn_is_serial:
            why = f"{heads} heads per TP rank do not divide by CP={cp}"
            if heads % cp == 0:
                why = "m2rnn_context_parallel='serial'"
            yield Cost("CP", "waits", f"Serial recurrence in R: {cp} segments in turn ({why})")
        else:
            yield Cost("CP", "forces", f"Heads of R over CP: {heads} per TP rank (CP={cp})")
    if sizes.has(Family.MAMBA):
        groups = int(sizes.config.mamba_num_groups) // layout.tp
        if groups < cp:
            text = (
                f"Repeated B and C of M: each group on {cp // groups} CP ranks ({groups} groups "
                f"per TP rank, CP={cp})"
            )
            yield Cost("CP", "repeats", text)


def _experts(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    layout = sizes.layout
    if not sizes.has(Family.EXPERT):
        return
    if layout.etp > 1:
        text = (
            f"Repeated tokens in E: every token copy on {layout.etp} ranks (ETP={layout.etp} "
            f"splits each expert's matrices, and its ranks gather their tokens)"
        )
        yield Cost("ETP", "repeats", text)
    if layout.ep > 1:
        text = (
            f"Expert load imbalance: not counted (EP={layout.ep}; bytes are for balanced routing, "
            f"and the rank whose experts get most tokens sets the pace)"
        )
        yield Cost("EP", "waits", text)
    if layout.etp != layout.tp:
        text = (
            f"Separate gradient groups for experts: {layout.expert_data_parallel_size} replicas of "
            f"an expert, {layout.data_parallel_size * layout.cp} of a dense layer "
            f"(ETP={layout.etp}, TP={layout.tp})"
        )
        yield Cost("ETP", "forces", text)


def _pipeline(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    layout = sizes.layout
    if layout.pp == 1:
        return
    chunks = f", {layout.vpp} chunks per stage" if (layout.vpp or 1) > 1 else ""
    text = (
        f"Pipeline bubble: {bubble_of(sizes):.0%} (PP={layout.pp}, "
        f"{sizes.job.num_microbatches} microbatches{chunks})"
    )
    yield Cost("PP", "bubble", text)
    firsts = [c.layers.start for stage in stages for c in stage.chunks if not c.owns_embedding]
    cuts = stage_cuts(sizes, firsts)
    for cut in cuts:
        if cut.seam is not None:
            yield Cost("PP", "waits", cut.seam)
    names = ", ".join(dict.fromkeys(name for cut in cuts for name in cut.items))
    if sends_shapes(sizes.letters, sizes.config, sizes.config):
        text = (
            f"Shape messages: {SHAPE_BYTES} bytes and a synchronization of the device before each "
            f"transfer (cuts: {len(cuts)}; {names})"
        )
        yield Cost("PP", "forces", text)
    if (padding := sum(cut.items.get("padding", 0) for cut in cuts)) > 0:
        text = (
            f"Padded messages: {show_bytes(padding)} of {show_bytes(sum(c.bytes for c in cuts))} a "
            f"microbatch (virtual stages send one shape over all {len(cuts)} cuts)"
        )
        yield Cost("PP", "forces", text)
    uneven = []
    for family in known_families():
        counts = [stage.places.count(family.value) for stage in stages]
        if max(counts) != min(counts):
            uneven.append(f"{min(counts)} to {max(counts)} {family.value}")
    if uneven:
        text = f"Uneven stages: {', '.join(uneven)} blocks per stage (PP={layout.pp})"
        yield Cost("PP", "waits", text)
    if layout.vpp is not None and layout.pp == 2:
        text = (
            "Pipeline messages: sent one by one and overlapped (overlap_p2p_comm on, "
            "batch_p2p_comm off: in one batch, two stages would mistake each other's messages)"
        )
        yield Cost("VPP", "forces", text)


def _optimizer(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    job, replicas = sizes.job, group_size(sizes.layout, "dp-cp")
    if replicas > 1 and not job.use_distributed_optimizer:
        text = (
            f"Repeated optimizer state: on all {replicas} replicas "
            f"(use_distributed_optimizer=true shards it)"
        )
        yield Cost("DP", "repeats", text)
    twice = job.use_distributed_optimizer and not job.overlap_param_gather
    if replicas > 1 and twice and sizes.has(Family.EXPERT):
        text = (
            "Repeated parameter gather: 2 per chunk (Megatron's dense and its expert optimizer "
            "each gather the whole chunk; with overlap_param_gather once)"
        )
        yield Cost("DP", "repeats", text)


def _kernels(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    if sizes.has(Family.RECURRENT) and not sizes.m2rnn_in_triton:
        text = f"Saved states of R: one in {CHECKPOINT_EVERY} tokens (torch kernel)"
        yield Cost("MODEL", "forces", text)
    if sizes.config.recompute_granularity is not None:
        chunks = [chunk for stage in stages for chunk in stage.chunks]
        share = recomputed_share(sizes.config, chunks)
        text = f"{described(sizes.config)}: {share:.0%} of the forward pass again"
        yield Cost("MODEL", "repeats", f"Recomputation in the backward pass: {text}")
    if sizes.config.mode == "mamba3" and sizes.has(Family.MAMBA):
        reason = mamba3_gpu_reason(sizes.mamba3, dtype=sizes.config.params_dtype)
        if reason is not None or sizes.config.mamba3_kernel == "torch":
            why = f"mamba_ssm's Triton kernel {reason}" if reason else "mamba3_kernel is 'torch'"
            yield Cost("MODEL", "turns off", f"Mamba-3 kernel: torch ({why})")


def _nodes(sizes: Sizes, stages: Sequence[BuiltStage]) -> Iterator[Cost]:
    gpus = sizes.job.gpus_per_node
    for group in ("cp", "ep", "pp"):
        facts = group_facts(sizes.layout, group, gpus)
        if facts.nodes > 1 and (group != "ep" or sizes.has(Family.EXPERT)):
            text = (
                f"Traffic between nodes: {group.upper()} groups of {facts.size} ranks on up to "
                f"{facts.nodes} nodes ({gpus} GPUs per node)"
            )
            yield Cost(group.upper(), "forces", text)
