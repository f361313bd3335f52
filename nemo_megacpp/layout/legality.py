"""Is a layout legal for a model? Every violation at once, each with choices that are legal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import islice, product
from typing import Any

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout.parallel import FIELD_OF, ParallelLayout, setting
from nemo_megacpp.layout.rules import RULES, LayoutCheck, LayoutViolation, ModelShape, divisors_of

_MOST_CHOICES = 6
_LARGEST_CANDIDATE = 1024
_POWERS = (1, 2, 4, 8, 16)


def check_layout(
    layout: ParallelLayout, shape: ModelShape, *, gpus_per_node: int | None = None
) -> list[LayoutViolation]:
    """Return every reason why ``layout`` is illegal for ``shape``; empty if it is legal.

    Args:
        layout: the degrees.
        shape: the model's sizes; those of families that the pattern lacks are not checked.
        gpus_per_node: GPUs of one NVLink domain, which TP groups must not leave; None: not checked.
    """
    unreadable = list(_unreadable(layout))
    # The other rules still apply, with the default in place of an unreadable degree.
    defaults: dict[str, Any] = {name: default for name, default, _ in unreadable}
    check = LayoutCheck(replace(layout, **defaults), shape, gpus_per_node)
    broken = _broken(check)
    return [violation for _, _, violation in unreadable] + [
        replace(item, legal=item.legal + _choices(check, item, broken)) for item in broken
    ]


def is_legal(
    layout: ParallelLayout, shape: ModelShape, *, gpus_per_node: int | None = None
) -> bool:
    """Say whether `check_layout` would find nothing, without looking for choices."""
    if any(True for _ in _unreadable(layout)):
        return False
    check = LayoutCheck(layout, shape, gpus_per_node)
    return not any(True for rule in RULES for _ in rule(check))


def validate_layout(
    layout: ParallelLayout, shape: ModelShape, *, gpus_per_node: int | None = None
) -> None:
    """Raise a UserError that lists all violations; do nothing if there are none."""
    violations = check_layout(layout, shape, gpus_per_node=gpus_per_node)
    if violations:
        raise UserError(describe_violations(layout, shape, violations))


def describe_violations(
    layout: ParallelLayout, shape: ModelShape, violations: Sequence[LayoutViolation]
) -> str:
    """Return one violation as it is, and several as a numbered list with the layout above it."""
    if len(violations) == 1:
        return str(violations[0])
    lines = [
        f"Layout {layout.short()} is illegal for this model of {len(shape.pattern)} layers, for "
        f"{len(violations)} reasons:",
        *(f"  {number}. {item}" for number, item in enumerate(violations, start=1)),
    ]
    return "\n".join(lines)


def nearest_legal(
    layout: ParallelLayout,
    shape: ModelShape,
    *,
    gpus_per_node: int | None = None,
    most: int = 3,
) -> list[ParallelLayout]:
    """Return the legal layouts of the same world that change the degrees least, nearest first.

    Near is a small sum of the logarithms by which degrees move. The degrees tried are the given
    ones, powers of two, and the divisors of depth and experts; SP is on wherever TP is above 1.

    Args:
        layout: the illegal layout; its degrees must be positive.
        shape: the model's sizes.
        gpus_per_node: as in `check_layout`.
        most: how many to return.
    """

    def distance(other: ParallelLayout) -> float:
        moved = sum(
            abs(math.log2(getattr(other, name) / getattr(layout, name)))
            for name in ("tp", "cp", "pp", "ep", "etp")
        )
        return moved + (layout.vpp != other.vpp) + 0.5 * (layout.sp != other.sp)

    near = sorted(_candidates(layout, shape), key=distance)
    legal = (other for other in near if is_legal(other, shape, gpus_per_node=gpus_per_node))
    return list(islice(legal, most))


def nearest_in_any_world(
    layout: ParallelLayout, shape: ModelShape, *, gpus_per_node: int | None = None
) -> list[ParallelLayout]:
    """Return what `nearest_legal` finds, in a world of another size if the given one has none.

    Degrees that cannot be read have no neighbours.
    """
    if any(degree < 1 for degree in (layout.world, layout.minimal_world_size)):
        return []
    here = nearest_legal(layout, shape, gpus_per_node=gpus_per_node)
    anywhere = replace(layout, world_size=None)
    return here or nearest_legal(anywhere, shape, gpus_per_node=gpus_per_node)


def describe_nearest(layout: ParallelLayout, nearest: Sequence[ParallelLayout]) -> str:
    """Return the layouts of `nearest_in_any_world` as a sentence."""
    if not nearest:
        return "No layout near this one is legal."
    elsewhere = layout.world_size != nearest[0].world_size
    where = " in a world of another size" if elsewhere else ""
    return f"Nearest legal layouts{where}: {'; '.join(x.short() for x in nearest)}."


def padded_vocab_size(vocab_size: int, divisible_by: int | None, tp: int) -> int:
    """The rows of the embedding: ``vocab_size``, rounded up for ``divisible_by`` and for TP.

    Megatron's rule is a multiple of ``divisible_by * tp``, and so another number of rows in another
    layout; as the padding's logits are part of the softmax, another loss as well. Here every TP
    that divides ``divisible_by`` gives the same rows. None or 0 turns padding off; TP must then
    divide the vocabulary.

    Raises:
        UserError: padding is off and TP does not divide.
    """
    if divisible_by:
        unit = math.lcm(divisible_by, tp)
        return -(-vocab_size // unit) * unit
    if vocab_size % tp:
        raise UserError(
            f"vocab_size = {vocab_size} is not divisible by TP = {tp}, and padding is off. Set "
            f"make_vocab_size_divisible_by, for example to 128."
        )
    return vocab_size


def _unreadable(layout: ParallelLayout) -> Iterator[tuple[str, Any, LayoutViolation]]:
    """Yield the name and default of each field that does not hold a degree, with its violation."""
    for field in fields(layout):
        name, value, default = field.name, getattr(layout, field.name), field.default
        if isinstance(default, bool):
            good, wanted = isinstance(value, bool), "true or false"
        else:
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            good, wanted = whole or (value is None and default is None), "a positive integer"
        if not good:
            message = f"{name} must be {wanted}; got {value!r}."
            legal = (setting(name, default),)
            axis = "DP" if name == "world_size" else setting(name, 0).partition("=")[0].upper()
            yield name, default, LayoutViolation(axis, f"degree-{name}", message, legal)


def _broken(check: LayoutCheck) -> list[LayoutViolation]:
    return [item for rule in RULES for item in rule(check)]


def _choices(
    check: LayoutCheck, item: LayoutViolation, before: list[LayoutViolation]
) -> tuple[str, ...]:
    """Find settings that repair ``item`` by trying them on the rules themselves."""
    rules, axes = {other.rule for other in before}, {other.axis for other in before}
    found: list[str] = []
    for knob in item.knobs:
        given = getattr(check.layout, knob) or 1
        candidates = range(1, min(max(2 * given, 16), _LARGEST_CANDIDATE) + 1)
        outcomes = {value: _broken(_turned(check, knob, value)) for value in candidates}
        # Best: no rule that this setting could meet is left broken. Otherwise the setting is right
        # on its own axis, while another axis, which has a violation too, still has to move.
        best = [
            value
            for value, after in outcomes.items()
            if {left.rule for left in after} <= rules - {item.rule}
            and not any(knob in left.knobs for left in after)
        ]
        fair = [
            value
            for value, after in outcomes.items()
            if {left.axis for left in after} <= axes - {item.axis}
        ]
        near = sorted(best or fair, key=lambda value: abs(value - given))[:_MOST_CHOICES]
        found += [setting(FIELD_OF[knob], value) for value in sorted(near)]
    return tuple(found)


def _turned(check: LayoutCheck, knob: str, value: int) -> LayoutCheck:
    degree: dict[str, Any] = {FIELD_OF[knob]: value}
    layout = replace(check.layout, **degree)
    if knob == "tp":
        # SP follows TP, as it does when a layout is parsed.
        sequence_parallel = layout.tp > 1 and (layout.sp or check.layout.tp == 1)
        layout = replace(layout, sequence_parallel=sequence_parallel)
    return replace(check, layout=layout)


def _candidates(layout: ParallelLayout, shape: ModelShape) -> Iterator[ParallelLayout]:
    tps = {*_POWERS, layout.tp}
    cps = {*_POWERS, layout.cp}
    pps = {*divisors_of(len(shape.pattern)), layout.pp, len(shape.pattern.cuts) + 1}
    eps = {*divisors_of(shape.num_moe_experts or 1), layout.ep}
    for tp, cp, pp, ep in product(*map(sorted, (tps, cps, pps, eps))):
        for etp in sorted({1, tp, layout.etp}):
            for vpp in {layout.vpp, None}:
                yield ParallelLayout(tp, tp > 1, cp, pp, vpp, ep, etp, layout.world_size)
