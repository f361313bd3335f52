"""The legal layouts of a world as tables for a terminal and as plain data.

The document of ``nemo-megacpp layouts --json``, version 1; sizes in bytes, keys are only ever
added within a version::

    schema: 1
    model, world_size, gpus_per_node, hbm_bytes, candidates, legal, fitting
    machine: as 'measure-machine' writes it; assumptions: in words
    order: how the layouts are ranked, in words
    work: {unit, families: {letter}, embedding, head}, by which cuts are balanced
    layouts: [{rank, layout, pattern, chunk_layers, cuts_balance, heaviest_chunk_over_mean, fits,
        fullest_stage, memory: {parameters, gradients, optimizer, activations, total},
        bubble, between_nodes_per_step, sent_per_step, estimate: {seconds, parts: {part: seconds},
        slowest_stage, tokens_per_second_per_gpu, model_flops_per_second_per_gpu,
        model_flops_utilization}}], the last three null for what does not fit
    rejected: [{setting, axis, rule, message, layouts}]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from nemo_megacpp.contract.candidates import Rejection
from nemo_megacpp.contract.layout_search import Priced, Search
from nemo_megacpp.contract.machine import Machine, machine_document
from nemo_megacpp.contract.stage_cuts import stage_cuts
from nemo_megacpp.contract.step_tables import assumptions, bar, legend, show_step, step_document
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.render import Table, Toned, print_table, show_bytes

SCHEMA = 1
ORDER = (
    "shortest estimated step; ties: fewest bytes between nodes, fewest bytes sent, emptiest GPU, "
    "text"
)
_BAR = 32
_LISTED = 8
"""Most chunks whose layers are listed one by one."""


def layouts_document(job: Job, search: Search, machine: Machine, top: int) -> dict[str, Any]:
    """Return the ``top`` best layouts and all rejections as plain data."""
    return {
        "schema": SCHEMA,
        "model": job.name,
        "world_size": job.layout.world,
        "gpus_per_node": job.gpus_per_node,
        "hbm_bytes": job.hbm_bytes,
        "machine": machine_document(machine),
        "assumptions": assumptions(machine),
        "candidates": search.candidates.total,
        "legal": len(search.candidates.legal),
        "fitting": len(search.fitting),
        "order": f"what fits first, by {ORDER}; then what does not fit, by memory",
        "work": {
            "unit": "forward operations per token",
            "families": _families(search),
            "embedding": search.work["embedding"],
            "head": search.work["head"],
        },
        "layouts": [
            _plain(rank, priced, job) for rank, priced in enumerate(search.ranked[:top], start=1)
        ],
        "rejected": [asdict(rejection) for rejection in search.candidates.rejected],
    }


def print_layouts(
    console: Console, job: Job, search: Search, machine: Machine, top: int, every_rejection: bool
) -> None:
    """Print the ``top`` best layouts, and why others were rejected: in groups, or all reasons."""
    candidates, limit = search.candidates, job.hbm_bytes
    verdict = (
        "memory not compared (--hbm)"
        if limit is None
        else f"{len(search.fitting):,} fit {show_bytes(limit)}"
    )
    ranks, total = job.layout.world, candidates.total
    console.print(
        f"[bold]{job.name}[/bold] on {ranks:,} rank{'s' * (ranks > 1)}, {job.gpus_per_node} GPUs a "
        f"node, speeds of {machine.name}: {total:,} layout{'s' * (total > 1)}, "
        f"{len(candidates.legal):,} legal, {verdict}"
    )
    if search.ranked:
        console.print(f"order: {ORDER}\n" if search.fitting else "order: memory\n")
        _ranking(console, search.ranked[:top], machine, limit)
        _cuts(console, job, search)
    _rejections(console, candidates.rejected, every_rejection)


def _ranking(
    console: Console, ranked: Sequence[Priced], machine: Machine, limit: int | None
) -> None:
    steps = [priced.step for priced in ranked if priced.step is not None]
    longest = max((step.seconds for step in steps), default=0.0)
    table = Table(
        (
            *("rank", "<layout", "step", "tokens/s", "MFU", "<where the time goes"),
            *("fullest GPU", *(["of it"] if limit else [])),
            *("between nodes", "sent", "<layers per chunk"),
        )
    )
    for rank, priced in enumerate(ranked, start=1):
        share = f"{priced.memory / limit:.0%}" if limit else ""
        over = limit is not None and priced.memory > limit
        step = priced.step
        table.add(
            str(rank),
            priced.layout.short().removesuffix(f",world={priced.layout.world}"),
            "-" if step is None else show_step(step.seconds),
            "-" if step is None else f"{step.tokens_per_gpu:,.0f}",
            "-" if step is None else f"{step.utilization:.1%}",
            "-" if step is None else bar(step, longest, _BAR),
            show_bytes(priced.memory),
            *([Toned(share, "bad") if over else share] if limit else []),
            "-" if priced.between_nodes is None else show_bytes(priced.between_nodes),
            "-" if priced.sent is None else show_bytes(priced.sent),
            _chunks(priced.chunk_sizes) + (", cut by memory" if priced.balance == "memory" else ""),
        )
    print_table(console, table)
    if steps:
        console.print(f"{legend(steps)}\n{assumptions(machine)}", highlight=False, soft_wrap=True)
    console.print(
        "Bytes are of one step and all ranks, tokens of one GPU; activations by formula, balanced "
        "routing; not counted: temporaries, fragmentation, the communication library's buffers.\n",
        soft_wrap=True,
    )


def _chunks(sizes: Sequence[int]) -> str:
    if len(sizes) <= _LISTED:
        return "+".join(map(str, sizes))
    return f"{len(sizes)} chunks of {min(sizes)} to {max(sizes)}"


def _cuts(console: Console, job: Job, search: Search) -> None:
    best = search.ranked[0]
    if best.layout.pp == 1:
        return
    unit = max(_families(search).values())
    weights = ", ".join(f"{place} {count / unit:.2f}" for place, count in search.work.items())
    console.print(
        f"cuts of the first: {best.pattern}\n"
        f"  balanced by work, in units of the heaviest layer ({unit / 1e6:,.1f} M operations a "
        f"token, forward): {weights}",
        highlight=False,
        soft_wrap=True,
    )
    sizes = Sizes(replace(job, layout=best.layout))
    chunks = best.pattern.chunks(best.layout.chunks_count)
    for cut in stage_cuts(sizes, [chunk.start for chunk in chunks[1:]]):
        if cut.seam is not None:
            console.print(f"  {cut.seam}", highlight=False, soft_wrap=True)
    console.print()


def _families(search: Search) -> dict[str, int]:
    return {place: work for place, work in search.work.items() if len(place) == 1}


def _rejections(console: Console, rejected: Sequence[Rejection], every: bool) -> None:
    if not rejected:
        return
    if every:
        table = Table(("layouts", "<with", "<axis", "<reason"), "Rejected")
        for item in rejected:
            table.add(f"{item.layouts:,}", item.setting, item.axis, item.message)
        print_table(console, table)
        return
    table = Table(("layouts", "<axis", "<for example", "<reason"), "Rejected (--rejected: all)")
    by_rule: dict[tuple[str, str], list[Rejection]] = {}
    for item in rejected:
        by_rule.setdefault((item.axis, item.rule), []).append(item)
    for (axis, _), items in sorted(by_rule.items(), key=lambda entry: -_count(entry[1])):
        table.add(f"{_count(items):,}", axis, items[0].setting, items[0].message)
    print_table(console, table)


def _count(items: Sequence[Rejection]) -> int:
    return sum(item.layouts for item in items)


def _plain(rank: int, priced: Priced, job: Job) -> dict[str, Any]:
    fullest = priced.stages[priced.fullest_stage]
    kinds = ("parameters", "gradients", "optimizer", "activations", "total")
    return {
        "rank": rank,
        "layout": priced.layout.short(),
        "pattern": str(priced.pattern),
        "chunk_layers": list(priced.chunk_sizes),
        "cuts_balance": priced.balance,
        "heaviest_chunk_over_mean": priced.heaviest,
        "fits": None if job.hbm_bytes is None else priced.memory <= job.hbm_bytes,
        "fullest_stage": priced.fullest_stage,
        "memory": {kind: getattr(fullest, kind) for kind in kinds},
        "bubble": priced.bubble,
        "between_nodes_per_step": priced.between_nodes,
        "sent_per_step": priced.sent,
        "estimate": None if priced.step is None else step_document(priced.step),
    }
