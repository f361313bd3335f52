"""The rules of legality: one small function each, listed in `RULES`.

A rule looks at one requirement and yields a `LayoutViolation` for each way in which it is not met.
Unless a comment says otherwise, the requirement is that of Megatron-Core 0.16.1, which asserts it
in a constructor, or not at all. Each rule stands alone: it must not assume that another one holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_megacpp.errors import UserError
from nemo_megacpp.families import block_of
from nemo_megacpp.layout.parallel import ParallelLayout
from nemo_megacpp.pattern import Family, HybridPattern, known_families


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model and its batch that a layout must divide.

    Sizes of a family are read only if the pattern holds the family; ``None`` is then a violation,
    except ``num_query_groups`` (None: one per head, as in Megatron) and the shared expert's size
    (None or 0: no shared expert). ``make_vocab_size_divisible_by`` of None or 0 turns padding off.
    A sequence length or batch size of None is not decided yet, and not checked.
    """

    pattern: HybridPattern
    hidden_size: int
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    mamba_num_heads: int | None = None
    mamba_num_groups: int | None = None
    m2rnn_num_heads: int | None = None
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    ffn_hidden_size: int | None = None
    vocab_size: int = 0
    make_vocab_size_divisible_by: int | None = None
    side_channels: Sequence[Mapping[str, Any]] | None = None
    seq_length: int | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    cp_comm_type: str | None = None

    @classmethod
    def read(
        cls, model: Mapping[str, Any], micro_batch_size: int | None, global_batch_size: int | None
    ) -> ModelShape:
        """Return the shape of a model with ``pattern`` and fields of
        :class:`nemo_megacpp.config.HybridConfig`, and of its batch in rows."""
        names = {field.name for field in dataclasses.fields(cls)}
        batch = {"micro_batch_size": micro_batch_size, "global_batch_size": global_batch_size}
        return cls(**{**{k: v for k, v in model.items() if k in names}, **batch})


@dataclass(frozen=True)
class LayoutCheck:
    """What the rules look at. All degrees of the layout are positive."""

    layout: ParallelLayout
    shape: ModelShape
    gpus_per_node: int | None = None

    def has(self, family: Family) -> bool:
        """Whether the pattern has blocks of ``family``."""
        return family in self.shape.pattern.all_families


@dataclass(frozen=True)
class LayoutViolation:
    """One reason why a layout is illegal.

    Attributes:
        axis: ``TP``, ``SP``, ``CP``, ``PP``, ``VPP``, ``EP``, ``ETP``, ``DP``, or ``MODEL`` where
            no layout would help.
        rule: a short, stable identifier.
        message: what is wrong, with the numbers.
        legal: the nearest choices, as ``name=value``, a layout's under the names that
            `ParallelLayout.parse` reads. A rule gives those that it knows by itself; for the
            ``knobs`` :func:`nemo_megacpp.layout.check_layout` adds degrees that it has tried on
            all rules. Empty if no single setting helps.
        knobs: the layout's settings (short names) that could meet the rule.
    """

    axis: str
    rule: str
    message: str
    legal: tuple[str, ...] = ()
    knobs: tuple[str, ...] = ()

    def __str__(self) -> str:
        choices: dict[str, list[str]] = {}
        for choice in self.legal:
            name, _, value = choice.partition("=")
            choices.setdefault(name, []).append(value)
        texts = [f"{name}={_either(values)}" for name, values in choices.items()]
        return f"{self.message} Use {', or '.join(texts)}." if texts else self.message


Rule = Callable[[LayoutCheck], Iterator[LayoutViolation]]


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

    def __call__(self, check: LayoutCheck) -> Iterator[LayoutViolation]:
        size = getattr(check.shape, self.size)
        degree = getattr(check.layout, self.degree)
        if size and size % degree:
            text = (
                f"{self.size} = {size} is not divisible by {self.degree.upper()} = {degree}: "
                f"{self.why}."
            )
            yield LayoutViolation(self.degree.upper(), self.rule, text, knobs=(self.degree,))


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

    def __call__(self, check: LayoutCheck) -> Iterator[LayoutViolation]:
        heads, groups = getattr(check.shape, self.heads), getattr(check.shape, self.groups)
        if heads and groups and heads % groups:
            text = f"{self.heads} = {heads} is not divisible by {self.groups} = {groups}."
            yield LayoutViolation(
                "MODEL",
                self.rule,
                text,
                legal=tuple(f"{self.groups}={v}" for v in _nearest_divisors(heads, groups)),
            )


def _sizes_given(check: LayoutCheck) -> Iterator[LayoutViolation]:
    for family in known_families():
        for name in block_of(family).required if check.has(family) else ():
            size = getattr(check.shape, name)
            if size is None or size < 1:
                text = f"The pattern has {family.value} blocks, but {name} is {size}."
                yield LayoutViolation("MODEL", f"missing-{name}", text)


def _world(check: LayoutCheck) -> Iterator[LayoutViolation]:
    layout = check.layout
    for rule, names, part in (
        ("world-dense", "TP x CP x PP", layout.model_parallel_size),
        ("world-expert", "ETP x EP x PP", layout.expert_model_parallel_span),
    ):
        if layout.world % part:
            text = f"A world of {layout.world} ranks is not divisible by {names} = {part}."
            yield LayoutViolation(
                "DP", rule, text, legal=_multiples("world", layout.world, layout.minimal_world_size)
            )


def _sequence_parallel(check: LayoutCheck) -> Iterator[LayoutViolation]:
    layout = check.layout
    if layout.sp and layout.tp == 1:
        text = "Sequence parallelism is TP's activation layout and needs TP > 1; TP is 1."
        yield LayoutViolation("SP", "sp-without-tp", text, legal=("sp=false",))
    if check.has(Family.EXPERT) and layout.tp > 1 and not layout.sp:
        text = (
            f"Training E blocks at TP = {layout.tp} needs sequence parallelism: Megatron's "
            f"MoELayer refuses to train without it."
        )
        yield LayoutViolation("SP", "experts-need-sp", text, legal=("sp=true",))


def _experts_exist(check: LayoutCheck) -> Iterator[LayoutViolation]:
    if check.layout.ep > 1 and not check.has(Family.EXPERT) and check.shape.num_moe_experts is None:
        text = f"EP = {check.layout.ep} splits an expert bank, but the model has no experts."
        yield LayoutViolation("EP", "no-experts", text, legal=("ep=1",))


def _sequence(check: LayoutCheck) -> Iterator[LayoutViolation]:
    layout, length = check.layout, check.shape.seq_length
    if length is None:
        return
    zigzag = 2 * layout.cp if layout.cp > 1 else 1
    shards = layout.tp * layout.cp if layout.sp else 1
    legal = _multiples("seq_length", length, math.lcm(zigzag, shards))
    if length % zigzag:
        text = (
            f"seq_length = {length} is not divisible by 2 x CP = {zigzag}: each CP rank takes one "
            f"chunk from either end of the sequence, to share the causal work evenly."
        )
        yield LayoutViolation("CP", "sequence-zigzag", text, knobs=("cp",), legal=legal)
    if length % shards:
        text = (
            f"seq_length = {length} is not divisible by TP x CP = {layout.tp} x {layout.cp} = "
            f"{shards}: sequence parallelism splits each CP shard over TP."
        )
        yield LayoutViolation("SP", "sequence-shards", text, knobs=("tp", "cp"), legal=legal)


def _vocabulary(check: LayoutCheck) -> Iterator[LayoutViolation]:
    # With padding on any TP is legal: `padded_vocab_size` makes the rows divide.
    tp, vocab = check.layout.tp, check.shape.vocab_size
    if not check.shape.make_vocab_size_divisible_by and vocab % tp:
        text = (
            f"vocab_size = {vocab} is not divisible by TP = {tp}, and padding is off "
            f"(make_vocab_size_divisible_by)."
        )
        yield LayoutViolation(
            "TP",
            "vocabulary",
            text,
            knobs=("tp",),
            legal=("make_vocab_size_divisible_by=128", f"vocab_size={-(-vocab // tp) * tp}"),
        )


def _side_channels(check: LayoutCheck) -> Iterator[LayoutViolation]:
    # A table has as many rows as its channel has ids: none is padded, whatever the layout.
    from nemo_megacpp.side_channels import read_side_channels  # it loads pydantic

    tp = check.layout.tp
    for channel in read_side_channels(check.shape.side_channels):
        rows = channel.vocab_size
        if channel.partition == "vocabulary" and rows % tp:
            text = (
                f"side channel {channel.name}: vocab_size = {rows} is not divisible by TP = {tp}, "
                f"over which partition=vocabulary splits its rows. Declare more ids, up to a "
                f"multiple, or set partition=replicated."
            )
            yield LayoutViolation("TP", "side-channel-rows", text, knobs=("tp",))


def _depth(check: LayoutCheck) -> Iterator[LayoutViolation]:
    layout = check.layout
    try:
        check.shape.pattern.chunks(layout.chunks_count)
    except UserError as error:
        virtual = "" if layout.vpp is None else f", VPP = {layout.vpp}"
        text = f"PP = {layout.pp}{virtual}: {error}"
        yield LayoutViolation(
            "PP", "depth", text, knobs=("pp",) if layout.vpp is None else ("pp", "vpp")
        )


def _virtual_stages(check: LayoutCheck) -> Iterator[LayoutViolation]:
    if check.layout.vpp is not None and check.layout.pp == 1:
        text = f"VPP = {check.layout.vpp} interleaves pipeline stages and needs PP > 1; PP is 1."
        yield LayoutViolation(
            "VPP", "virtual-without-pipeline", text, knobs=("pp",), legal=("vpp=none",)
        )


def _batch(check: LayoutCheck) -> Iterator[LayoutViolation]:
    layout, micro, size = check.layout, check.shape.micro_batch_size, check.shape.global_batch_size
    if micro is None or size is None or layout.world % layout.model_parallel_size:
        return
    replicas = layout.data_parallel_size
    # Megatron's default for virtual stages: groups of PP microbatches (schedules.py).
    group = layout.pp if layout.vpp is not None and layout.pp > 1 else 1
    if size % (micro * replicas * group) == 0:
        return
    per_replica = size // (replicas * group) if size % (replicas * group) == 0 else 0
    legal = [
        *(f"micro_batch_size={value}" for value in _nearest_divisors(per_replica, micro)),
        *_multiples("global_batch_size", size, micro * replicas * group),
    ]
    given = f"global {size}, micro {micro} × DP {replicas}"
    if size % (micro * replicas):
        axis, rule, message = "DP", "batch", f"Batch sizes do not fit: {given}."
    else:
        axis, rule = "VPP", "interleaved-microbatches"
        message = (
            f"{size // (micro * replicas)} microbatches do not fit the interleaved schedule, which "
            f"takes them in groups of PP = {layout.pp}: {given}."
        )
    yield LayoutViolation(axis, rule, message, legal=tuple(legal))


def _nvlink_domain(check: LayoutCheck) -> Iterator[LayoutViolation]:
    # Stricter than Megatron: it would run, over the network. TP is fastest in the rank order, so
    # its groups stay inside nodes exactly if the node divides into them.
    gpus, layout = check.gpus_per_node, check.layout
    if gpus is None:
        return
    degrees = {"tp": layout.tp}
    if check.has(Family.EXPERT):
        degrees["etp"] = layout.etp
    for name, degree in degrees.items():
        if degree > gpus or (gpus % degree and layout.world > gpus):
            text = (
                f"{name.upper()} = {degree} does not fit the NVLink domain of {gpus} GPUs a node: "
                f"some of its groups would span two nodes."
            )
            yield LayoutViolation(name.upper(), f"nvlink-{name}", text, knobs=(name,))


def _families(check: LayoutCheck) -> Iterator[LayoutViolation]:
    """The rules of the families that the pattern holds; others need not have their sizes."""
    for family in known_families():
        for rule in block_of(family).rules if check.has(family) else ():
            yield from rule(check)


RULES: tuple[Rule, ...] = (
    _sizes_given,
    _world,
    _families,
    _sequence_parallel,
    _experts_exist,
    _sequence,
    _vocabulary,
    _side_channels,
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


def divisors_of(number: int) -> list[int]:
    """Return the divisors of ``number``, ascending; none of 0 and of negative numbers."""
    low = [value for value in range(1, math.isqrt(max(number, 0)) + 1) if number % value == 0]
    return sorted({*low, *(number // value for value in low)})


def _nearest_divisors(number: int, value: int, most: int = 4) -> list[int]:
    return sorted(sorted(divisors_of(number), key=lambda divisor: abs(divisor - value))[:most])


def _either(values: Sequence[str]) -> str:
    """Return ``1, 2 or 4``."""
    return " or ".join(filter(None, (", ".join(values[:-1]), values[-1])))
