"""``nemo-megacpp layouts``: rank the legal layouts of a recipe, and write one as a recipe."""

from __future__ import annotations

import dataclasses
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.commands.arguments import add_recipe, print_json, read_count, read_recipe
from nemo_megacpp.commands.plan import add_hardware, print_assumed, read_hardware
from nemo_megacpp.errors import UserError
from nemo_megacpp.render import show_bytes

if TYPE_CHECKING:
    from nemo_megacpp.contract.layout_search import Priced, Search
    from nemo_megacpp.layout import ParallelLayout
    from nemo_megacpp.recipes.recipe import Recipe

_WIDTH = 170
"""Columns of the tables."""
_DEGREES = ("tp", "sp", "cp", "pp", "vpp", "ep", "etp")


def add_parser(commands: Any) -> None:
    """Add ``layouts`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "layouts",
        help="rank all legal layouts of a number of ranks, with pipeline cuts",
        description="Rank every legal layout of a recipe: what fits the GPU first, by the "
        "estimated time of a step. Pipelines are cut by work. Needs no GPU.",
    )
    add_recipe(parser, overrides="settings to change; a degree, such as tp=8, fixes that axis")
    add_hardware(parser)
    parser.add_argument("--top", default="10", metavar="N", help="layouts to show; default: 10")
    parser.add_argument(
        "--recompute",
        choices=("given", "auto"),
        default="given",
        help="auto: if no layout fits, choose the recompute of activations with which one does; "
        "default: as the recipe has it",
    )
    parser.add_argument("--rejected", action="store_true", help="show every reason for a rejection")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--write", metavar="FILE.yaml", help="write a recipe that 'plan' and 'train' accept"
    )
    parser.add_argument("--pick", metavar="N", help="the rank of the layout to write; default: 1")
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    """Print the ranked layouts of a recipe; with ``--write``, write one as YAML.

    Returns:
        0, or 1 if no legal layout fits the GPU, or 2 if no layout is legal.

    Raises:
        UserError: an option or setting that cannot be read, or nothing to write.
    """
    from nemo_megacpp.contract.layout_search import search_layouts
    from nemo_megacpp.contract.recompute_choice import search_with_recompute
    from nemo_megacpp.contract.search_tables import layouts_document, print_layouts
    from nemo_megacpp.layout import ParallelLayout
    from nemo_megacpp.preflight.model_checks import validate_model
    from nemo_megacpp.recipes.views import job_of, shape_of
    from nemo_megacpp.render import make_console

    hardware, machine = read_hardware(args)
    hbm = hardware["hbm_bytes"]
    top = read_count("--top", args.top)
    if args.pick is not None and args.write is None:
        raise UserError("--pick chooses what is written: give --write FILE.yaml as well.")
    pick = read_count("--pick", args.pick or "1")
    if args.write is not None:
        _validate_path(Path(args.write))
    given = read_recipe(args)
    print_assumed(given)
    if given.layout.world_size is None:
        raise UserError("The number of ranks is missing: give --world-size N.")
    world = read_count("world_size", str(given.layout.world_size))
    fixed = _fixed(given.layout, args)
    # The search chooses the cuts and the layout.
    recipe = _in_layout(given, ParallelLayout(world_size=world), given.pattern.letters)
    validate_model(recipe)
    job = job_of(recipe, **hardware)
    shape = shape_of(recipe)
    search = search_layouts(job, shape, world, machine, fixed)
    if args.recompute == "auto" and search.ranked and not search.fitting:
        found = search_with_recompute(
            job, lambda job: search_layouts(job, shape, world, machine, fixed)
        )
        if found is not None:
            form, job, search = found
            given = _with_recompute(given, form)
            print(f"No layout fits as given. Chosen: {_settings(form)}.", file=sys.stderr)
    if not search.candidates.total:
        given_degrees = ", ".join(f"{k}={str(v).lower()}" for k, v in fixed.items())
        raise UserError(
            f"No layout of {world:,} ranks has {given_degrees}: the degrees must divide it."
        )
    chosen = _choose(search, pick, hbm) if args.write is not None else None
    if args.json:
        print_json(layouts_document(job, search, machine, top))
    else:
        console = make_console(_WIDTH)
        if given.pattern.cuts:
            console.print(f"The recipe's {len(given.pattern.cuts)} cuts are replaced: see below.")
        print_layouts(console, job, search, machine, top, args.rejected)
    if chosen is not None:
        _write(Path(args.write), _in_layout(given, chosen.layout, str(chosen.pattern)), chosen)
        print(f"written: {args.write} ({chosen.layout.short()})", file=sys.stderr)
    if not search.ranked:
        print(f"nemo-megacpp: no layout of {world:,} ranks is legal.", file=sys.stderr)
        return 2
    if not search.fitting and hbm is not None:
        least = show_bytes(search.too_big[0].memory)
        hint = "; --recompute auto tries recompute" if args.recompute == "given" else ""
        print(
            f"nemo-megacpp: none of {len(search.too_big):,} legal layouts fits {show_bytes(hbm)}; "
            f"the smallest holds {least} on its fullest GPU{hint}.",
            file=sys.stderr,
        )
        return 1
    return 0


def _with_recompute(recipe: Recipe, form: dict[str, Any]) -> Recipe:
    from nemo_megacpp.contract.recompute_choice import SETTINGS

    own = {name: value for name, value in recipe.model.items() if name not in SETTINGS}
    return dataclasses.replace(recipe, model={**own, **form})


def _settings(form: dict[str, Any]) -> str:
    """Return settings as a command line takes them."""
    words = (f"{k}={','.join(v) if isinstance(v, list) else v}" for k, v in form.items())
    return " ".join(words)


def _fixed(layout: ParallelLayout, args: Namespace) -> dict[str, Any]:
    """Return the degrees that the command line gave, by short name."""
    from nemo_megacpp.layout.parallel import FIELD_OF
    from nemo_megacpp.recipes.given import read_command_line
    from nemo_megacpp.recipes.names import full_names

    given = full_names(read_command_line(args.overrides, args.layout))
    return {name: getattr(layout, name) for name in _DEGREES if FIELD_OF[name] in given}


def _in_layout(recipe: Recipe, layout: ParallelLayout, pattern: str) -> Recipe:
    model = {**recipe.model, "hybrid_pattern": pattern, "num_layers": len(recipe.pattern)}
    return dataclasses.replace(recipe, model=model, layout=layout)


def _choose(search: Search, pick: int, hbm: int | None) -> Priced:
    choices = search.fitting
    if not choices:
        what = "is legal" if not search.too_big else f"fits {show_bytes(hbm or 0)}"
        raise UserError(f"There is nothing to write: no layout {what}.")
    if pick > len(choices):
        raise UserError(f"--pick {pick}: there are {len(choices):,} layouts to choose from.")
    return choices[pick - 1]


def _validate_path(path: Path) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--write {path}: a recipe's file name ends in .yaml.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--write {path}: there is no folder {path.parent}, or it is the file.")


def _write(path: Path, recipe: Recipe, chosen: Priced) -> None:
    import yaml

    assert chosen.step is not None
    sent = show_bytes(chosen.between_nodes or 0)
    text = (
        f"# {recipe.name} in {chosen.layout.describe()}\n"
        f"# By plan: {show_bytes(chosen.memory)} on the fullest GPU, {sent} between nodes a step, "
        f"{chosen.step.seconds:.3g} s a step (estimated).\n"
    )
    path.write_text(text + yaml.safe_dump(recipe.to_mapping(), sort_keys=False), encoding="utf-8")
