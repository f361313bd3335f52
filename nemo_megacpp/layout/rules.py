"""The rules of legality: one small function each, listed in `RULES`.

A rule looks at one requirement and yields a `Broken` for each way in which it is not met. Unless
said otherwise, the requirement is Megatron-Core 0.16.1's own, which there is an assertion in a
constructor, or nothing at all. Each rule stands alone: it must not assume that another holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nemo_megacpp.errors import UserError
from nemo_megacpp.families import block_of
from nemo_megacpp.layout.parallel import ParallelLayout
from nemo_megacpp.layout.shape import ModelShape
from nemo_megacpp.pattern import Family, known_families


@dataclass(frozen=True)
class Case:
    """What the rules look at. All degrees of the layout are positive."""

    layout: ParallelLayout
    shape: ModelShape
    gpus_per_node: int | None = None

    def has(self, family: Family) -> bool:
        return family in self.shape.pattern.families


@dataclass(frozen=True)
class Broken:
    """A requirement that is not met.

    ``knobs`` are the layout's settings (short names) that could meet it; ``legal`` are choices that
    the rule knows by itself.
    """

    axis: str
    rule: str
    message: str
    knobs: tuple[str, ...] = ()
    legal: tuple[str, ...] = ()


Rule = Callable[[Case], Iterator[Broken]]


@dataclass(frozen=True)
class Divides:
    """The rule that a degree divides a size of the model.

    Attributes:
        rule: a short, stable identifier.
        size: field of :class:`nemo_megacpp.layout.ModelShape`.
        degree: short name of the layout's degree.
        why: what is split, for the message.
    """

    rule: str
    size: str
    degree: str
    why: str

    def __call__(self, case: Case) -> Iterator[Broken]:
        size = getattr(case.shape, self.size)
        degree = getattr(case.layout, self.degree)
        if size and size % degree:
            yield Broken(
                self.degree.upper(),
                self.rule,
                f"{self.size} = {size} is not divisible by {self.degree.upper()} = {degree}: "
                f"{self.why}.",
                knobs=(self.degree,),
            )


@dataclass(frozen=True)
class GroupsDivideHeads:
    """The rule that heads come in equal groups.

    Attributes:
        rule: a short, stable identifier.
        heads: field of :class:`nemo_megacpp.layout.ModelShape`.
        groups: another one.
    """

    rule: str
    heads: str
    groups: str

    def __call__(self, case: Case) -> Iterator[Broken]:
        heads, groups = getattr(case.shape, self.heads), getattr(case.shape, self.groups)
        if heads and groups and heads % groups:
            divisors = [value for value in range(1, heads + 1) if heads % value == 0]
            close = sorted(divisors, key=lambda value: abs(value - groups))[:4]
            yield Broken(
                "MODEL",
                self.rule,
                f"{self.heads} = {heads} is not divisible by {self.groups} = {groups}.",
                legal=tuple(f"{self.groups}={value}" for value in sorted(close)),
            )


def _sizes_given(case: Case) -> Iterator[Broken]:
    for family in known_families():
        for name in block_of(family).required if case.has(family) else ():
            size = getattr(case.shape, name)
            if size is None or size < 1:
                yield Broken(
                    "MODEL",
                    f"missing-{name}",
                    f"the pattern has {family.value} blocks, but {name} is {size}.",
                )


def _world(case: Case) -> Iterator[Broken]:
    layout = case.layout
    for rule, names, part in (
        ("world-dense", "TP x CP x PP", layout.model_parallel_size),
        ("world-expert", "ETP x EP x PP", layout.expert_model_parallel_span),
    ):
        if layout.world % part:
            yield Broken(
                "DP",
                rule,
                f"a world of {layout.world} ranks is not divisible by {names} = {part}.",
                legal=_multiples("world", layout.world, layout.minimal_world_size),
            )


def _sequence_parallel(case: Case) -> Iterator[Broken]:
    layout = case.layout
    if layout.sp and layout.tp == 1:
        yield Broken(
            "SP",
            "sp-without-tp",
            "sequence parallelism is TP's activation layout and needs TP > 1; TP is 1.",
            legal=("sp=false",),
        )
    if case.has(Family.EXPERT) and layout.tp > 1 and not layout.sp:
        yield Broken(
            "SP",
            "experts-need-sp",
            f"training E blocks at TP = {layout.tp} needs sequence parallelism: Megatron's "
            f"MoELayer refuses to train without it.",
            legal=("sp=true",),
        )


def _experts_exist(case: Case) -> Iterator[Broken]:
    if case.layout.ep > 1 and not case.has(Family.EXPERT) and case.shape.num_moe_experts is None:
        yield Broken(
            "EP",
            "no-experts",
            f"EP = {case.layout.ep} splits an expert bank, but the model has no experts.",
            legal=("ep=1",),
        )


def _sequence(case: Case) -> Iterator[Broken]:
    layout, length = case.layout, case.shape.seq_length
    if length is None:
        return
    zigzag = 2 * layout.cp if layout.cp > 1 else 1
    shards = layout.tp * layout.cp if layout.sp else 1
    legal = _multiples("seq_length", length, math.lcm(zigzag, shards))
    if length % zigzag:
        yield Broken(
            "CP",
            "sequence-zigzag",
            f"seq_length = {length} is not divisible by 2 x CP = {zigzag}: each CP rank takes one "
            f"chunk from either end of the sequence, to share the causal work evenly.",
            knobs=("cp",),
            legal=legal,
        )
    if length % shards:
        yield Broken(
            "SP",
            "sequence-shards",
            f"seq_length = {length} is not divisible by TP x CP = {layout.tp} x {layout.cp} = "
            f"{shards}: sequence parallelism splits each CP shard over TP.",
            knobs=("tp", "cp"),
            legal=legal,
        )


def _vocabulary(case: Case) -> Iterator[Broken]:
    # With padding on any TP is legal: `padded_vocab_size` makes the rows divide.
    tp, vocab = case.layout.tp, case.shape.vocab_size
    if not case.shape.make_vocab_size_divisible_by and vocab % tp:
        yield Broken(
            "TP",
            "vocabulary",
            f"vocab_size = {vocab} is not divisible by TP = {tp}, and padding is off "
            f"(make_vocab_size_divisible_by).",
            knobs=("tp",),
            legal=("make_vocab_size_divisible_by=128", f"vocab_size={-(-vocab // tp) * tp}"),
        )


def _depth(case: Case) -> Iterator[Broken]:
    layout = case.layout
    try:
        case.shape.pattern.chunks(layout.chunks_count)
    except UserError as error:
        virtual = "" if layout.vpp is None else f", VPP = {layout.vpp}"
        yield Broken(
            "PP",
            "depth",
            f"PP = {layout.pp}{virtual}: {error}",
            knobs=("pp",) if layout.vpp is None else ("pp", "vpp"),
        )


def _virtual_stages(case: Case) -> Iterator[Broken]:
    if case.layout.vpp is not None and case.layout.pp == 1:
        yield Broken(
            "VPP",
            "virtual-without-pipeline",
            f"VPP = {case.layout.vpp} interleaves pipeline stages and needs PP > 1; PP is 1.",
            knobs=("pp",),
            legal=("vpp=none",),
        )


def _batch(case: Case) -> Iterator[Broken]:
    layout, micro, size = case.layout, case.shape.micro_batch_size, case.shape.global_batch_size
    if micro is None or size is None or layout.world % layout.model_parallel_size:
        return
    replicas = layout.data_parallel_size
    step = micro * replicas
    interleaved = layout.vpp is not None and layout.pp > 1
    legal = _multiples("global_batch_size", size, step * (layout.pp if interleaved else 1))
    if size % step:
        yield Broken(
            "DP",
            "batch",
            f"global_batch_size = {size} is not divisible by micro_batch_size x DP = "
            f"{micro} x {replicas} = {step}.",
            legal=legal,
        )
    elif interleaved and size // step % layout.pp:
        # With Megatron's default of PP microbatches per virtual-stage group (schedules.py).
        yield Broken(
            "VPP",
            "interleaved-microbatches",
            f"{size // step} microbatches (global_batch_size {size} / {step}) are not divisible by "
            f"PP = {layout.pp}: the interleaved schedule takes them in groups of PP.",
            legal=legal,
        )


def _nvlink_domain(case: Case) -> Iterator[Broken]:
    # Stricter than Megatron: it would run, over the network. TP is fastest in the rank order, so
    # its groups stay inside nodes exactly if the node divides into them.
    gpus, layout = case.gpus_per_node, case.layout
    if gpus is None:
        return
    degrees = {"tp": layout.tp}
    if case.has(Family.EXPERT):
        degrees["etp"] = layout.etp
    for name, degree in degrees.items():
        if degree > gpus or (gpus % degree and layout.world > gpus):
            yield Broken(
                name.upper(),
                f"nvlink-{name}",
                f"{name.upper()} = {degree} does not fit the NVLink domain of {gpus} GPUs a node: "
                f"some of its groups would span two nodes.",
                knobs=(name,),
            )


def _families(case: Case) -> Iterator[Broken]:
    """The rules of the families that the pattern holds; others need not have their sizes."""
    for family in known_families():
        for rule in block_of(family).rules if case.has(family) else ():
            yield from rule(case)


RULES: tuple[Rule, ...] = (
    _sizes_given,
    _world,
    _families,
    _sequence_parallel,
    _experts_exist,
    _sequence,
    _vocabulary,
    _depth,
    _virtual_stages,
    _batch,
    _nvlink_domain,
)
"""All rules; those of a family are declared with it (:mod:`nemo_megacpp.families`)."""


def _multiples(name: str, value: int, unit: int) -> tuple[str, ...]:
    """The multiples of ``unit`` next below and above ``value``, as settings."""
    below = value // unit * unit
    return tuple(f"{name}={choice}" for choice in (below, below + unit) if choice > 0)
