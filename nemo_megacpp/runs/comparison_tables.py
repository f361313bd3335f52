"""A comparison as tables in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rich.console import Console

from nemo_megacpp.render import Table, print_table, show_bytes

if TYPE_CHECKING:
    from nemo_megacpp.runs.comparison import Comparison, ContractEffect, Pair, RunsEffect
    from nemo_megacpp.runs.untried import Untried


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print what differs and, if at most one axis moved, its effect."""
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        kind = "recipe" if side.curve is None else f"run of {len(side.curve.steps)} steps"
        console.print(
            f"[bold]{letter}[/bold] {side.name} ({kind}): {side.recipe.layout.describe()}",
            highlight=False,
        )
    console.print()
    _differences(console, comparison)
    moved = comparison.moved
    if not moved:
        console.print("No axis moved: A and B are one recipe.")
        if comparison.runs is not None:
            console.print("The numbers below show the spread from run to run.\n")
    elif len(moved) == 1:
        console.print(f"One axis moved: [bold]{moved[0]}[/bold]. Its effect:\n")
    else:
        console.print(
            f"{len(moved)} axes moved: [bold]{', '.join(moved)}[/bold]. No conclusion can be drawn "
            f"about any of them: an effect could be that of another. Compare two that differ on "
            f"one axis."
        )
    if comparison.contract is not None:
        _contract(console, comparison.contract)
    if comparison.runs is not None:
        _runs(console, comparison.runs)
    if comparison.untried:
        console.print("[bold]Layouts that were not run, of A's recipe[/bold]", highlight=False)
    for layout in comparison.untried:
        console.print(_untried(layout, comparison.hbm), highlight=False, markup=False)
    for note in comparison.notes:
        console.print(f"[yellow]{note}[/yellow]", highlight=False)


def _differences(console: Console, comparison: Comparison) -> None:
    if not comparison.differences:
        return
    table = Table(("<axis", "<setting", "<A", "<B"))
    for item in comparison.differences:
        table.add(item.axis, item.setting, item.a, item.b)
    console.print("[bold]What differs[/bold]")
    print_table(console, table)
    console.print()


def _contract(console: Console, effect: ContractEffect) -> None:
    title = "Memory of the fullest rank, by plan (activations by formula)"
    _pairs(console, title, effect.memory, show_bytes)
    _pairs(console, "Sent by all ranks in one step, by plan", effect.sent, show_bytes)
    for word, lines in (("only in A", effect.dropped), ("only in B", effect.added)):
        for line in lines:
            console.print(f"  {word}: {line}", highlight=False, markup=False)
    if effect.added or effect.dropped:
        console.print()


def _runs(console: Console, effect: RunsEffect) -> None:
    if effect.first_loss_difference is None:
        console.print("The runs have no step in common.")
    else:
        where = f"training at step {effect.last_step}"
        losses = [effect.loss]
        if effect.heldout_step is not None:
            where += f", held-out at step {effect.heldout_step}"
            losses.append(effect.heldout_loss)
        _pairs(console, f"Loss, in nats per token ({where})", losses, lambda x: f"{x:.7f}")
        console.print(
            f"training loss over {effect.steps} common steps: first difference "
            f"{effect.first_loss_difference:.2e} (step {effect.first_step}), largest "
            f"{effect.largest_loss_difference:.2e} (step {effect.at_step}), mean "
            f"{effect.mean_loss_difference:.2e}\n"
        )
    if any(value is not None for pair in effect.memory for value in (pair.a, pair.b)):
        _pairs(console, "Measured peak memory of the fullest rank", effect.memory, show_bytes)
    speed = [
        *effect.first_step_seconds,
        effect.seconds_per_step._replace(name="other steps, median"),
        *effect.spread_seconds,
        effect.tokens_per_second,
    ]
    known = [pair for pair in speed if pair.a is not None or pair.b is not None]
    title = "Measured seconds of the first step and of the others, and tokens per second (median)"
    _pairs(console, title, known, lambda value: f"{value:,.4g}")


def _pairs(
    console: Console, title: str, pairs: Iterable[Pair], show: Callable[[float], str]
) -> None:
    table = Table(("<", "A", "B", "B / A"))
    for pair in pairs:
        values = ["-" if value is None else show(value) for value in (pair.a, pair.b)]
        table.add(pair.name, *values, "-" if pair.ratio is None else f"{pair.ratio:.3f}")
    console.print(f"[bold]{title}[/bold]", highlight=False)
    print_table(console, table)
    console.print()


def _untried(layout: Untried, hbm: int | None) -> str:
    name = layout.layout.short()
    if layout.reasons:
        lines = [f"  {name} is illegal:", *(f"    - {reason}" for reason in layout.reasons)]
        return "\n".join([*lines, *([f"    {layout.advice}"] if layout.advice else [])])
    assert layout.memory is not None
    text = f"  {name} is legal: {show_bytes(layout.memory)} on the fullest rank by plan"
    if hbm is None:
        return text
    free = hbm - layout.memory
    return f"{text}, {show_bytes(abs(free))} {'free' if free >= 0 else 'too much'}"
