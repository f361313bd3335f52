"""Is a layout legal for a model? Every violation at once, each with choices that are legal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout.parallel import FIELD_OF, ParallelLayout, setting
from nemo_megacpp.layout.rules import RULES, Broken, Case
from nemo_megacpp.layout.shape import ModelShape

_MOST_CHOICES = 6
_LARGEST_CANDIDATE = 1024


@dataclass(frozen=True)
class Violation:
    """One reason why a layout is illegal.

    Attributes:
        axis: ``TP``, ``SP``, ``CP``, ``PP``, ``VPP``, ``EP``, ``ETP``, ``DP``, or ``MODEL`` where
            no layout would help.
        rule: a short, stable identifier.
        message: what is wrong, with the numbers.
        legal: the nearest choices, as ``name=value``, a layout's under the names that
            `ParallelLayout.parse` reads. A degree was tried on all rules: it meets this one, and
            no axis without a violation gets one. Empty if no single setting helps.
    """

    axis: str
    rule: str
    message: str
    legal: tuple[str, ...]

    def __str__(self) -> str:
        legal = f" Legal: {' or '.join(self.legal)}." if self.legal else ""
        return f"[{self.axis}] {self.message}{legal}"


def check_layout(
    layout: ParallelLayout, shape: ModelShape, *, gpus_per_node: int | None = None
) -> list[Violation]:
    """Return every reason why ``layout`` is illegal for ``shape``; empty if it is legal.

    Args:
        layout: the degrees asked for.
        shape: the model's sizes; those of families that the pattern lacks are not looked at.
        gpus_per_node: GPUs of one NVLink domain, which TP groups must not leave; None: not checked.
    """
    unreadable = list(_unreadable(layout))
    # The other rules still apply, with 1 in place of a degree that is none.
    stand_ins: dict[str, Any] = {name: default for name, default, _ in unreadable}
    readable = replace(layout, **stand_ins)
    case = Case(readable, shape, gpus_per_node)
    broken = _broken(case)
    return [violation for _, _, violation in unreadable] + [
        Violation(item.axis, item.rule, item.message, item.legal + _choices(case, item, broken))
        for item in broken
    ]


def is_legal(
    layout: ParallelLayout, shape: ModelShape, *, gpus_per_node: int | None = None
) -> bool:
    """Say whether `check_layout` would find nothing, without looking for choices."""
    if any(True for _ in _unreadable(layout)):
        return False
    case = Case(layout, shape, gpus_per_node)
    return not any(True for rule in RULES for _ in rule(case))


def validate_layout(
    layout: ParallelLayout, shape: ModelShape, *, gpus_per_node: int | None = None
) -> None:
    """Raise a UserError that lists all violations, numbered; do nothing if there are none."""
    violations = check_layout(layout, shape, gpus_per_node=gpus_per_node)
    if violations:
        count = f"{len(violations)} reason{'s' if len(violations) > 1 else ''}"
        raise UserError(
            f"Layout {layout.short()} is illegal for this model of {len(shape.pattern)} layers, "
            f"for {count}:\n"
            + "\n".join(f"  {number}. {item}" for number, item in enumerate(violations, start=1))
        )


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


def _unreadable(layout: ParallelLayout) -> Iterator[tuple[str, Any, Violation]]:
    """The fields that hold no degree, with a stand-in for each."""
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
            yield name, default, Violation(axis, f"degree-{name}", message, legal)


def _broken(case: Case) -> list[Broken]:
    return [item for rule in RULES for item in rule(case)]


def _choices(case: Case, item: Broken, before: list[Broken]) -> tuple[str, ...]:
    """Find settings that repair ``item`` by trying them on the rules themselves."""
    rules, axes = {other.rule for other in before}, {other.axis for other in before}
    found: list[str] = []
    for knob in item.knobs:
        asked = getattr(case.layout, knob) or 1
        candidates = range(1, min(max(2 * asked, 16), _LARGEST_CANDIDATE) + 1)
        outcomes = {value: _broken(_turned(case, knob, value)) for value in candidates}
        # Best: no rule that this setting could meet is left broken. Else the setting is right on
        # its own axis, while another axis, which has a violation too, still has to move.
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
        found += [setting(FIELD_OF[knob], value) for value in _nearest(best or fair, asked)]
    return tuple(found)


def _turned(case: Case, knob: str, value: int) -> Case:
    degree: dict[str, Any] = {FIELD_OF[knob]: value}
    layout = replace(case.layout, **degree)
    if knob == "tp":
        # SP follows TP, as it does when a layout is parsed.
        sequence_parallel = layout.tp > 1 and (layout.sp or case.layout.tp == 1)
        layout = replace(layout, sequence_parallel=sequence_parallel)
    return replace(case, layout=layout)


def _nearest(values: list[int], asked: int) -> list[int]:
    return sorted(sorted(values, key=lambda value: abs(value - asked))[:_MOST_CHOICES])
