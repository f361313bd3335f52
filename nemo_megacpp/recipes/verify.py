"""``nemo-megacpp verify``: a recipe's layout, proved on a small model of its proportions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.verify import Trial, verify
from nemo_megacpp.recipes.check import check_model_of, shape_of
from nemo_megacpp.recipes.recipe import Recipe, resolve

_WIDTH = 130
"""Columns of the table; a narrower terminal wraps its lines rather than lose numbers."""
_HEADINGS = {
    "forward": "forward",
    "aux loss": "aux",
    "gradients": "grads",
    "replicas": "replicas",
    "gradient norm": "norm",
    "step": "step",
    "checkpoint": "ckpt",
}


def verify_recipe(source: str, layout: str | None, overrides: Iterable[str], as_json: bool) -> int:
    """Prove the layout of a recipe and print a table, or JSON, of the differences.

    Args:
        source: a recipe's name or a YAML file.
        layout: ``tp=2,cp=2,…`` in place of the recipe's own.
        overrides: ``key=value`` strings.
        as_json: print one JSON document instead of a table.

    Returns:
        0 if every number agrees, 1 if a layout changes one.

    Raises:
        UserError: for a recipe or layout that is illegal.
    """
    recipe = resolve(source, overrides)
    if layout is not None:
        recipe = dataclasses.replace(recipe, layout=ParallelLayout.parse(layout))
    check_model_of(recipe)
    model = {**recipe.model}
    if model.get("m2rnn_num_heads") is None:
        model["m2rnn_num_heads"] = HybridConfig(**recipe.model).m2rnn_num_heads

    def shape(small: Any) -> Any:
        rows = 2 * recipe.layout.pp * recipe.layout.data_parallel_size
        training = dataclasses.replace(recipe.training, micro_batch_size=1, global_batch_size=rows)
        return shape_of(_with(recipe, dict(small), training))

    console = Console(stderr=as_json)
    console.width = max(console.width, _WIDTH)
    console.print(f"{recipe.name}: {recipe.layout.describe()}, on a canary of its proportions")
    trials = []
    for trial in verify(model, recipe.layout, shape, lambda line: console.print(f"  {line}")):
        trials.append(trial)
    good = all(trial.holds for trial in trials)
    if as_json:
        print(json.dumps({"holds": good, "trials": [_plain(t) for t in trials]}, indent=1))
    else:
        _print(console, trials)
    return 0 if good else 1


def _with(recipe: Recipe, model: dict[str, Any], training: Any) -> Recipe:
    return dataclasses.replace(recipe, model=model, training=training)


def _plain(trial: Trial) -> dict[str, Any]:
    plain = dataclasses.asdict(trial)
    for rung, source in zip(plain["rungs"], trial.rungs, strict=True):
        rung["holds"] = source.holds
    return {**plain, "holds": trial.holds}


def _print(console: Console, trials: list[Trial]) -> None:
    """Print the largest relative difference per rung, and what broke first where something did."""
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for heading in ("model", "layout", "", *_HEADINGS.values()):
        table.add_column(heading, no_wrap=True)
    for trial in trials:
        cells = {rung.name: rung for rung in trial.rungs}
        table.add_row(
            trial.model,
            trial.layout if trial.axis == "together" else f"{trial.axis} alone: {trial.layout}",
            trial.dtype.replace("float", "f"),
            *(_cell(cells[name]) if name in cells else "-" for name in _HEADINGS),
        )
    console.print(table)
    limits = {f"{t.dtype} {r.name} {r.tolerance:.0e}": None for t in trials for r in t.rungs}
    console.print("tolerances: " + ", ".join(limits))
    for trial in trials:
        if trial.error is not None:
            console.print(f"[red]{trial.model} in {trial.layout}: {trial.error}[/red]")
        for rung in (r for r in trial.rungs if not r.holds):
            console.print(
                f"[red]{trial.model} in {trial.layout} ({trial.axis}): {rung.name} differs by "
                f"{rung.difference:.1e}, allowed {rung.tolerance:.0e}; {rung.where}[/red]"
            )
            break
    if all(trial.holds for trial in trials):
        console.print("every number agrees: the layout changes where they live, not what they are")


def _cell(rung: Any) -> str:
    text = f"{rung.difference:.0e}" if rung.difference else "0"
    return text if rung.holds else f"[red]{text}[/red]"
