"""``nemo-megacpp placement``: where NCCL put the groups of a run."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.commands.arguments import print_json, read_count
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.render import Table, Toned, make_console, print_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nemo_megacpp.doctor.job_groups import GroupKind
    from nemo_megacpp.doctor.nccl_log import Communicator

_WIDTH = 110
_SHOWN = 9
"""Ranks of a group that are listed."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser of ``nemo-megacpp``."""
    parser: ArgumentParser = commands.add_parser(
        "placement",
        help="show on which nodes NCCL put the groups of a run",
        description="Read what NCCL wrote with NCCL_DEBUG=INFO, name its communicators by the "
        "layout's TP, CP, EP, PP and other groups, and show the nodes that each spans. Exit code 1 "
        "if a TP group leaves its node.",
    )
    parser.add_argument("logs", nargs="+", metavar="LOG", help="output of all nodes of the run")
    parser.add_argument("--recipe", help="the run's recipe: its layout is the one to compare with")
    parser.add_argument(
        "--layout", metavar="tp=8,pp=2,…", help="the run's degrees, or those changed in the recipe"
    )
    parser.add_argument(
        "--world-size", metavar="N", help="ranks; default: those of the largest communicator"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    from nemo_megacpp.doctor.job_groups import match_groups
    from nemo_megacpp.doctor.nccl_log import read_communicators

    communicators = read_communicators(_lines(args.logs))
    layout = _layout(args, communicators)
    kinds = match_groups(communicators, layout)
    leaving = [kind for kind in kinds if kind.leaves_its_node]
    if args.json:
        groups = [kind._asdict() for kind in kinds]
        print_json({"layout": layout.short(), "groups": groups, "inside_nodes": not leaving})
    else:
        _print(kinds, layout)
    return 1 if leaving else 0


def _lines(logs: Sequence[str]) -> Iterator[str]:
    for log in logs:
        if not Path(log).is_file():
            raise UserError(f"{log} is not a file.")
        with Path(log).open(encoding="utf-8", errors="replace") as stream:
            yield from iter(lambda: stream.readline(1 << 16), "")


def _layout(args: Namespace, communicators: Sequence[Communicator]) -> ParallelLayout:
    if args.recipe is None and args.layout is None:
        raise UserError("Give the layout of the run: --layout tp=8,pp=2 or --recipe RECIPE.")
    largest = max(len(communicator.members) for communicator in communicators)
    world = args.world_size or str(largest)
    if args.recipe is not None:
        from nemo_megacpp.recipes.recipe import resolve

        layout = resolve(args.recipe, [], args.layout, world).layout
    else:
        layout = ParallelLayout.parse(args.layout)
        if layout.world_size is None:
            layout = layout.changed({"world": read_count("--world-size", world)})
    return layout


def _print(kinds: Sequence[GroupKind], layout: ParallelLayout) -> None:
    from nemo_megacpp.doctor.job_groups import OTHER

    console = make_console(_WIDTH)
    console.print(layout.describe())
    table = Table(("<group", "size", "in the log", "of", "nodes", "<over", "<the widest, by rank"))
    for kind in kinds:
        ranks = ", ".join(map(str, kind.widest[:_SHOWN])) + (", …" * (len(kind.widest) > _SHOWN))
        nodes = str(kind.nodes)
        table.add(
            kind.name,
            f"{kind.size:,}",
            f"{kind.found:,}",
            "" if kind.expected is None else f"{kind.expected:,}",
            Toned(nodes, "bad") if kind.leaves_its_node else nodes,
            ", ".join(kind.transports),
            ranks,
        )
    print_table(console, table)
    strange = sum(kind.found for kind in kinds if kind.name == OTHER)
    if strange:
        console.print(
            f"[yellow]{strange:,} communicators join no group of this layout: see that it is the "
            f"run's[/yellow]"
        )
    leaving = [kind.name for kind in kinds if kind.leaves_its_node]
    console.print(
        f"[red]leave their node: {', '.join(leaving)}. Start the ranks of a node one after another "
        f"(torchrun, or srun --distribution=block), or lower the degree.[/red]"
        if leaving
        else "[green]every TP group is inside a node[/green]"
    )
