"""What ``nemo-megacpp gathers`` prints: a table for people, one JSON document for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from nemo_megacpp.contract.traffic import place_collectives
from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.collectives import Collective, again
from nemo_megacpp.formulas.sizes import Sizes
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.layout.placement import group_of
from nemo_megacpp.pattern import Family
from nemo_megacpp.proof.gather_recorder import RecordedGather
from nemo_megacpp.proof.gather_verdicts import JudgedGather
from nemo_megacpp.render import Cell, Table, Toned, print_table, show_bytes

SCHEMA = 1
"""Version of the JSON document. It grows when a key is removed or changes its meaning."""

_PLACES = ("embedding", "head")


@dataclass(frozen=True)
class GatherRow:
    """One gather or all-to-all of the depth.

    Attributes:
        judged: what was recorded, and the verdict.
        recipe_bytes: of the same collective in the recipe's own sizes, by the family's formula;
            None if the family declares no such collective.
        lives: until when the gathered tensor lives.
    """

    judged: JudgedGather
    recipe_bytes: int | None
    lives: str

    @property
    def is_undone(self) -> bool:
        """Whether it is a convenience gather."""
        return self.judged.judged.verdict == "undone"


def gather_rows(
    judged: Sequence[JudgedGather], proxy: Sizes | None, real: Sizes | None
) -> list[GatherRow]:
    """Return the rows of the report, in the order of the depth.

    Args:
        judged: gathers of the proxy model.
        proxy, real: sizes of the proxy model and of the recipe in the same layout; None where a
            family declares no formulas.
    """
    return [
        GatherRow(
            one,
            None if proxy is None or real is None else _in_recipe(one.gather, proxy, real),
            _lives(one.gather),
        )
        for one in judged
    ]


def _in_recipe(gather: RecordedGather, proxy: Sizes, real: Sizes) -> int | None:
    """Return the bytes of a collective in the recipe: the formulas of both list the same ones."""
    family = gather.place.family
    if family not in _PLACES and not (family and block_of(Family(family)).is_priced):
        return None
    small, large = (_declared(sizes, family) for sizes in (proxy, real))
    if len(small) != len(large):
        return None
    found = {
        theirs.bytes
        for mine, theirs in zip(small, large, strict=True)
        if (mine.kind, mine.phase, mine.bytes) == (gather.kind, gather.phase, gather.bytes)
        and _same_ranks(proxy.layout, gather, mine)
    }
    return found.pop() if len(found) == 1 else None


def _declared(sizes: Sizes, place: str) -> list[Collective]:
    made = place_collectives(sizes, place)
    return made + again(made)


def _same_ranks(layout: ParallelLayout, gather: RecordedGather, planned: Collective) -> bool:
    return tuple(sorted(group_of(layout, gather.ranks[0], planned.group))) == gather.ranks


def _lives(gather: RecordedGather) -> str:
    until = gather.freed or gather.last_read
    phase, _, path = until.partition(" ")
    where = _inside(path, gather) if path else "the end of the step"
    if phase != gather.phase and phase:
        where = f"{phase}: {where}"
    return where if gather.freed else f"{where}, kept"


def _inside(path: str, gather: RecordedGather) -> str:
    """Return the name of a module, without the layer if that is the gather's own."""
    if path == gather.place.path:
        return "itself"
    name, layer = relative(path), _layer_of(path)
    if layer is None or layer == gather.place.layer:
        return name or "the layer's end"
    return f"layer {layer}, {name}" if name else f"layer {layer}"


def relative(path: str) -> str:
    """Return a module's name inside its layer."""
    return path if _layer_of(path) is None else ".".join(path.split(".")[3:])


def _layer_of(path: str) -> int | None:
    parts = path.split(".")
    return int(parts[2]) + 1 if parts[:2] == ["decoder", "layers"] else None


def print_gathers(console: Console, rows: Sequence[GatherRow]) -> None:
    """Print one row for each kind of gather, with the layers that make it, and name the undone."""
    table = Table(
        (
            *("<layers", "<phase", "<asked by", "<collective", "<group", "bytes"),
            *("in recipe", "<lives until", "<verdict"),
        )
    )
    same: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        layer = row.judged.gather.place.layer
        same.setdefault(_cells(row), []).extend([] if layer is None else [layer])
    for (family, *plain, undone, verdict), layers in same.items():
        shown: Cell = Toned(verdict, "bad") if undone else verdict
        where = f"{family} {', '.join(map(str, dict.fromkeys(layers)))}"
        table.add(where.strip(), *plain, shown)
    print_table(console, table)
    for row in rows:
        if row.is_undone:
            console.print(f"[red]{_named(row)}[/red]", soft_wrap=True)
    if not any(row.is_undone for row in rows):
        console.print("every gather is needed: no gathered tensor is cut back before it is used")


def _cells(row: GatherRow) -> tuple[Any, ...]:
    gather, judged = row.judged.gather, row.judged.judged
    name = relative(gather.place.path)
    return (
        gather.place.family or "-",
        gather.phase,
        name or gather.place.class_name,
        gather.kind,
        row.judged.group,
        show_bytes(gather.bytes),
        "-" if row.recipe_bytes is None else show_bytes(row.recipe_bytes),
        row.lives,
        row.is_undone,
        f"{judged.verdict}: {judged.why}",
    )


def _named(row: GatherRow) -> str:
    gather, judged = row.judged.gather, row.judged.judged
    place = f"layer {gather.place.layer} ({gather.place.family})" if gather.place.layer else "-"
    caller = f" ({gather.caller})" if gather.caller else ""
    return (
        f"convenience gather: {place}, {gather.phase} pass: {gather.place.class_name}{caller} "
        f"makes an {gather.kind} over {row.judged.group} of {show_bytes(gather.bytes)}: "
        f"{judged.why}"
    )


def gathers_document(
    recipe: str, layout: ParallelLayout, rows: Sequence[GatherRow]
) -> dict[str, Any]:
    """Return the JSON document of an inspection.

    Keys: ``schema`` (:data:`SCHEMA`), ``recipe``, ``layout`` (as text), ``ranks``, ``undone`` (how
    many convenience gathers there are) and ``gathers``, in the order in which the first rank of
    each pipeline stage makes them: ``layer``, ``family``, ``phase``, ``module``, ``class``,
    ``caller``, ``collective``, ``group``, ``ranks``, ``bytes``, ``recipe_bytes`` (or null),
    ``lives_until``, ``verdict`` (``needed`` or ``undone``), ``operator`` and ``why``.
    """
    gathers = []
    for row in rows:
        gather, judged = row.judged.gather, row.judged.judged
        gathers.append(
            {
                "layer": gather.place.layer,
                "family": gather.place.family,
                "phase": gather.phase,
                "module": gather.place.path,
                "class": gather.place.class_name,
                "caller": gather.caller,
                "collective": gather.kind,
                "group": row.judged.group,
                "ranks": list(gather.ranks),
                "bytes": gather.bytes,
                "recipe_bytes": row.recipe_bytes,
                "lives_until": row.lives,
                **dataclasses.asdict(judged),
            }
        )
    return {
        "schema": SCHEMA,
        "recipe": recipe,
        "layout": layout.short(),
        "ranks": layout.world,
        "undone": sum(row.is_undone for row in rows),
        "gathers": gathers,
    }
