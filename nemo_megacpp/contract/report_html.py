"""A plan as one web page that needs nothing else: no script, no font, no file beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from nemo_megacpp.contract.picture import (
    END_COLOUR,
    FAMILY_COLOURS,
    MEMORY_COLOURS,
    legend,
    memory_picture,
    nodes_picture,
    stages_picture,
)
from nemo_megacpp.contract.plan import Plan, StagePlan
from nemo_megacpp.contract.units import show_bytes

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { font-size: 1.15em; margin: 1.8em 0 .5em; }
svg { max-width: 100%; height: auto; } svg text { font: 13px system-ui, sans-serif;
fill: currentColor; } svg .b { font-weight: 600; } svg .s { font-size: 11px; }
svg .on { fill: #fff; } table { border-collapse: collapse; font-size: 13px; width: 100%; }
th { text-align: left; border-bottom: 2px solid var(--line); padding: 3px 10px 3px 0; }
td { border-bottom: 1px solid var(--line); padding: 3px 10px 3px 0; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.legend .key { margin-right: 1.4em; white-space: nowrap; } .legend i { display: inline-block;
width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.good { color: #2e8540; } .bad { color: #c22; } .scroll { overflow-x: auto; }
details { margin: .4em 0; } summary { cursor: pointer; font-weight: 600; }
.note { color: #777; font-size: 13px; }
"""
_FAMILY_NAMES = {"A": "A attention", "M": "M Mamba", "E": "E experts", "R": "R recurrent"}


def html_report(plan: Plan) -> str:
    """Return the page."""
    job = plan.job
    title = f"{job.name}: {job.layout.short()}"
    kernels = (
        "Transformer Engine and mamba_ssm kernels; their activations are formulas that no GPU has "
        "confirmed yet"
        if job.kernels == "gpu"
        else "plain torch kernels; their activations are formulas held to recorded runs"
    )
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{plan.parameters:,} parameters. {escape(job.layout.describe())}, {job.gpus_per_node} "
        f"GPUs a node. {job.precision}, {job.global_batch_size} rows of "
        f"{plan.sizes.config.seq_length:,} tokens a step, in {job.num_microbatches} microbatches "
        f"of {job.micro_batch_size} a replica. {_verdict(plan)}</p>",
        "<h2>Stages and blocks</h2>",
        _stages(plan),
        "<h2>Memory of one rank</h2>",
        _memory(plan),
        f'<p class="note">Parameters, gradients and optimizer are exact. Activations are by '
        f"formula, at the peak of Megatron's schedule: {kernels}. Not counted: temporaries, "
        f"fragmentation, the communication library's buffers.</p>",
        _stage_table(plan),
        "<h2>Where ranks sit</h2>",
        '<p class="note">A cell is a rank, coloured by its stage, with its place on tp, cp and dp; '
        "the first and the last node of each stage.</p>",
        nodes_picture(plan),
        _group_table(plan),
        "<h2>What a rank sends in one step</h2>",
        *(_traffic_table(stage, stage is plan.fullest) for stage in plan.stages),
        "<h2>Who owns what</h2>",
        *(_family_details(plan, place) for place in plan.activations),
        "<h2>What this layout costs</h2>",
        _list(f"<b>{c.axis}</b> {c.effect} {escape(c.message)}" for c in plan.costs),
    ]
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(sections)}</body></html>\n"
    )


def plan_summary(plan: Plan) -> str:
    """Return the pictures of stages and memory and what the layout costs, for another page."""
    style = (
        "svg text { font: 13px system-ui, sans-serif; } svg .b { font-weight: 600; } "
        "svg .s { font-size: 11px; } svg .on { fill: #fff; } .legend .key { margin-right: 1.4em; } "
        ".legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }"
    )
    return "\n".join(
        (
            f"<style>{style}</style>",
            f"<p>{plan.parameters:,} parameters; activations by formula.</p>",
            _stages(plan),
            _memory(plan),
            _list(f"<b>{c.axis}</b> {c.effect} {escape(c.message)}" for c in plan.costs),
        )
    )


def _stages(plan: Plan) -> str:
    present = set(plan.sizes.config.pattern.letters)
    families = {k: v for k, v in FAMILY_COLOURS.items() if k in present}
    names = {**_FAMILY_NAMES, "": "embedding, head"}
    return legend({**families, "": END_COLOUR}, names) + stages_picture(plan)


def _memory(plan: Plan) -> str:
    return legend(MEMORY_COLOURS) + memory_picture(plan)


def _verdict(plan: Plan) -> str:
    if plan.fits is None or plan.job.hbm_bytes is None:
        return ""
    limit = show_bytes(plan.job.hbm_bytes)
    fullest = f"The fullest rank holds {show_bytes(plan.fullest.memory.total)}"
    if plan.fits:
        return f'<b class="good">{fullest} and fits {limit}.</b>'
    return f'<b class="bad">{fullest} and does not fit {limit}.</b>'


def _stage_table(plan: Plan) -> str:
    rows = [
        (
            str(stage.pp_rank),
            stage.letters,
            f"{stage.parameters:,}",
            *(show_bytes(getattr(stage.memory, name)) for name in MEMORY_COLOURS),
            "+".join(map(str, stage.memory.in_flight)),
            show_bytes(stage.memory.total),
        )
        for stage in plan.stages
    ]
    heads = ("stage", "layers", "#parameters of a rank", "#weights", "#gradients", "#optimizer")
    return _table((*heads, "#activations", "#microbatches in flight", "#total"), rows)


def _group_table(plan: Plan) -> str:
    rows = [
        (
            group.name,
            str(group.size),
            str(group.groups),
            str(group.nodes),
            ", ".join(map(str, group.example[:12])) + (", …" if group.size > 12 else ""),
        )
        for group in plan.groups
    ]
    return _table(("group", "#size", "#how many", "#nodes of the widest", "of rank 0"), rows)


def _traffic_table(stage: StagePlan, is_open: bool) -> str:
    rows = [
        (
            item.group,
            f"{item.calls:,}",
            show_bytes(item.tensor_bytes),
            show_bytes(item.sent_bytes),
            show_bytes(item.between_nodes) if item.between_nodes else "-",
        )
        for item in stage.traffic
    ]
    total = show_bytes(sum(item.sent_bytes for item in stage.traffic))
    between = show_bytes(sum(item.between_nodes for item in stage.traffic))
    table = _table(("group", "#calls", "#tensors", "#sent", "#between nodes"), rows)
    return _details(
        f"stage {stage.pp_rank}: {total}, of which {between} between nodes", table, is_open
    )


def _family_details(plan: Plan, place: str) -> str:
    owned = [
        (
            item.name,
            _shape(item.global_shape),
            _shape(item.local_shape),
            ", ".join(item.split) or "whole" + (f": {item.why}" if item.why else ""),
            ", ".join(f"{word} on {axis}" for axis, word in item.on.items()) or "-",
            ", then ".join(item.gradient),
        )
        for item in plan.owned
        if item.family == place
    ]
    made = next(
        (made for stage in plan.stages for name, _, made in stage.microbatch if name == place), ()
    )
    sent = [
        (c.phase, c.kind, c.group, show_bytes(c.bytes), str(c.count), c.role, c.what) for c in made
    ]
    kept = [(item.what, show_bytes(item.bytes)) for item in plan.activations[place]]
    total = show_bytes(sum(item.bytes for item in plan.activations[place]))
    parts = [
        _table(("parameter", "whole", "on a rank", "split", "per axis", "gradient"), owned),
        "<p><b>Collectives of one layer in one microbatch</b></p>",
        _table(("phase", "collective", "group", "#bytes", "#count", "role", "of"), sent)
        if sent
        else "<p>none</p>",
        f"<p><b>Kept for the backward pass (formula): {total}</b></p>",
        _table(("tensor", "#bytes"), kept),
    ]
    return _details(_FAMILY_NAMES.get(place, place), "".join(parts))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A ``#`` before a heading sets its column to the right."""
    numeric = [head.startswith("#") for head in heads]
    line = "".join(
        f"<th{_right(n)}>{escape(h.lstrip('#'))}</th>" for h, n in zip(heads, numeric, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_right(n)}>{escape(cell)}</td>" for cell, n in zip(row, numeric, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{line}</tr>{body}</table></div>'


def _right(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _details(summary: str, content: str, is_open: bool = False) -> str:
    start = "<details open>" if is_open else "<details>"
    return f"{start}<summary>{escape(summary)}</summary>{content}</details>"


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
