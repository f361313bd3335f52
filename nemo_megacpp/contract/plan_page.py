"""A plan as one web page: tables, and pictures of stages, memory and nodes as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nemo_megacpp.contract.layout_plan import Plan, StagePlan
from nemo_megacpp.contract.plan_tables import (
    NOT_COUNTED,
    activation_table,
    collective_table,
    cut_table,
    group_table,
    layout_line,
    ownership_table,
    place_name,
    rank_range,
    run_line,
    stage_table,
    traffic_table,
    verdict,
)
from nemo_megacpp.contract.step_tables import assumptions, parts_table, step_line
from nemo_megacpp.formulas.sizes import PREDICTION
from nemo_megacpp.layout.placement import degrees_of
from nemo_megacpp.render import html_details, html_list, html_page, html_table, show_bytes

FAMILY_COLOURS = {"A": "#4c78a8", "M": "#54a24b", "E": "#f58518", "R": "#b279a2", "F": "#ff9da6"}
END_COLOUR = "#9d9da1"
MEMORY_COLOURS = {
    "parameters": "#4c78a8",
    "gradients": "#72b7b2",
    "optimizer": "#eeca3b",
    "activations": "#e45756",
}
_ADDED_COLOURS = ("#bab0ac", "#d37295", "#fabfd2", "#9c755f", "#59a14f", "#edc948")
"""Of families that a user adds, in the order of their letters."""
_STAGE_COLOURS = ("#35455e", "#66789a", "#3f625d", "#6b8a83", "#5e5044", "#8a7868")
"""Other colours than the families': a stage is not a family."""
_WIDTH = 1080
_LEFT = 150
_MOST_STAGES = 64
_MOST_NODES = 16


def html_report(plan: Plan) -> str:
    """Return the page."""
    title = f"{plan.job.name}: {plan.job.layout.short()}"
    fits = "" if plan.fits is None else verdict(plan)
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(layout_line(plan))}.<br>{escape(run_line(plan))}.</p>",
        f'<p><b class="{"good" if plan.fits else "bad"}">{escape(fits)}</b></p>',
        "<h2>Stages and blocks</h2>",
        _stages(plan),
        "<h2>Memory of one rank</h2>",
        _memory(plan),
        f'<p class="note">Parameters, gradients and optimizer are exact. Activations are by '
        f"formula, at the peak of Megatron's schedule. Not counted: {NOT_COUNTED}.</p>",
        html_table(stage_table(plan, plan.stages)),
        *_step(plan),
        "<h2>Where ranks sit</h2>",
        '<p class="note">A cell is a rank, coloured by its stage, with its place on tp, cp and dp; '
        "the first and the last node of each stage.</p>",
        nodes_picture(plan),
        html_table(group_table(plan)),
        "<h2>What a rank sends in one step</h2>",
        *(_traffic(stage, stage is plan.fullest) for stage in plan.stages),
        *_cuts(plan),
        "<h2>Who owns what</h2>",
        *(_family_details(plan, place) for place in plan.activations),
        "<h2>What this layout costs</h2>",
        _costs(plan),
    ]
    return html_page(title, sections)


def plan_summary(plan: Plan) -> str:
    """Return the pictures of stages and memory and what the layout costs, for another page."""
    return "\n".join(
        (
            f"<p>{plan.parameters:,} parameters; activations by formula.</p>",
            _stages(plan),
            _memory(plan),
            _costs(plan),
        )
    )


def _stages(plan: Plan) -> str:
    families = family_colours(plan)
    names = {**{letter: place_name(letter) for letter in families}, "": "embedding, head"}
    return legend({**families, "": END_COLOUR}, names) + stages_picture(plan)


def _memory(plan: Plan) -> str:
    return legend(MEMORY_COLOURS) + memory_picture(plan)


def _costs(plan: Plan) -> str:
    return html_list(escape(cost.message) for cost in plan.costs)


def _step(plan: Plan) -> list[str]:
    if plan.machine is None or plan.step is None:
        return []
    how = (plan.step, plan.machine, plan.job.precision)
    return [
        "<h2>Estimated step</h2>",
        f"<p>{escape(step_line(*how))}.</p>",
        html_table(parts_table(*how)),
        f'<p class="note">{escape(assumptions(plan.machine))}.</p>',
    ]


def _cuts(plan: Plan) -> list[str]:
    """Return what crosses the pipeline's cuts; nothing where there are none."""
    if not plan.cuts:
        return []
    table = cut_table(plan)
    return [
        "<h2>What crosses a cut</h2>",
        f'<p class="note">{escape(table.title)}.</p>',
        html_table(table),
    ]


def _traffic(stage: StagePlan, is_open: bool) -> str:
    total = show_bytes(sum(item.sent_bytes for item in stage.traffic))
    between = show_bytes(sum(item.between_nodes for item in stage.traffic))
    summary = f"stage {stage.pp_rank}: {total}, of which {between} between nodes"
    return html_details(summary, html_table(traffic_table(stage)), is_open)


def _family_details(plan: Plan, place: str) -> str:
    sent = collective_table(plan, place)
    parts = (
        html_table(ownership_table(plan, place)),
        "<p><b>Collectives of one layer in one microbatch</b></p>",
        html_table(sent) if sent.rows else "<p>none</p>",
        "<p><b>Saved activations of one microbatch (formula)</b></p>",
        html_table(activation_table(plan, place)),
    )
    return html_details(place_name(place), "".join(parts))


def family_colours(plan: Plan) -> dict[str, str]:
    """Return the colour of each family of the model, by letter, the built-in ones first."""
    pattern = plan.sizes.config.pattern
    present = {*pattern.letters, *pattern.mtp_letters}
    added = sorted(present - FAMILY_COLOURS.keys())
    return {
        **{letter: colour for letter, colour in FAMILY_COLOURS.items() if letter in present},
        **{x: _ADDED_COLOURS[n % len(_ADDED_COLOURS)] for n, x in enumerate(added)},
    }


def stages_picture(plan: Plan) -> str:
    """Draw each stage as a row of blocks, in the order in which its chunks run."""
    stages, colours = plan.stages[:_MOST_STAGES], family_colours(plan)
    longest = max(
        sum(len(c.places) for c in stage.built.chunks) + len(stage.built.chunks) for stage in stages
    )
    step = min(40.0, (_WIDTH - _LEFT) / longest)
    parts = []
    for row, stage in enumerate(stages):
        y, x = row * 44, float(_LEFT)
        ranks = "rank" if stage.ranks == 1 else "ranks"
        parts.append(_text(0, y + 16, f"stage {stage.pp_rank}", "b"))
        parts.append(_text(0, y + 31, f"{ranks} {rank_range(stage)}", "s"))
        for chunk in stage.built.chunks:
            blocks = [("embedding", "in", END_COLOUR)] if chunk.owns_embedding else []
            blocks += [
                (f"layer {layer}, {letter}", letter, colours[letter])
                for layer, letter in zip(chunk.layers, chunk.letters, strict=True)
            ]
            blocks += [
                (f"prediction depth, {place}", "next", END_COLOUR)
                if place == PREDICTION
                else (f"prediction depth, {place}", place, colours[place])
                for place in chunk.prediction
            ]
            blocks += [("final norm, head and loss", "out", END_COLOUR)] if chunk.owns_head else []
            for title, label, colour in blocks:
                parts.append(_box(x, y, step - 3, 32, colour, title, label))
                x += step
            x += step / 2
    return _svg(len(stages) * 44, parts)


def memory_picture(plan: Plan) -> str:
    """Draw each stage's memory as a stacked bar, against the GPU's where one was named."""
    stages = plan.stages[:_MOST_STAGES]
    limit = plan.job.hbm_bytes or 0
    scale = (_WIDTH - _LEFT - 110) / max(limit, *(stage.memory.total for stage in stages))
    parts = []
    for row, stage in enumerate(stages):
        y, x = row * 34, float(_LEFT)
        parts.append(_text(0, y + 18, f"stage {stage.pp_rank}", "b"))
        for name, colour in MEMORY_COLOURS.items():
            size = getattr(stage.memory, name)
            title = f"{name}: {show_bytes(size)}"
            parts.append(_box(x, y, max(size * scale, 0.5), 26, colour, title))
            x += size * scale
        parts.append(_text(x + 8, y + 18, show_bytes(stage.memory.total)))
    if limit:
        at, height = _LEFT + limit * scale, len(stages) * 34
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height}" stroke="currentColor" '
            f'stroke-dasharray="5 4"/>'
        )
        parts.append(_text(at, height + 14, f"GPU: {show_bytes(limit)}", "s", "end"))
    return _svg(len(stages) * 34 + (20 if limit else 0), parts)


def nodes_picture(plan: Plan) -> str:
    """Draw the first nodes of each stage, a cell for each rank with its place on tp, cp and dp."""
    gpus, layout = plan.job.gpus_per_node, plan.job.layout
    picked = _nodes_to_draw(plan)
    per_row = max(1, _WIDTH // (min(gpus, 8) * 62 + 24))
    axes = [axis for axis in ("tp", "cp", "dp") if degrees_of(layout)[axis] > 1]
    rows_of_node = -(-min(gpus, 64) // 8)
    height = rows_of_node * 46 + 34
    parts = []
    for index, node in enumerate(picked):
        left = (index % per_row) * (min(gpus, 8) * 62 + 24)
        top = index // per_row * height
        parts.append(_text(left, top + 12, f"node {node}", "b"))
        ranks = range(node * gpus, min((node + 1) * gpus, layout.world))
        for slot, rank in enumerate(ranks[:64]):
            place = layout.rank_coordinates(rank)
            x, y = left + slot % 8 * 62, top + 20 + slot // 8 * 46
            title = (
                f"rank {rank}: tp {place.tp}, cp {place.cp}, dp {place.dp}, stage {place.pp}; "
                f"experts: etp {place.etp}, ep {place.ep}, edp {place.edp}"
            )
            colour = _STAGE_COLOURS[place.pp % len(_STAGE_COLOURS)]
            parts.append(_box(x, y, 58, 40, colour, title))
            parts.append(_text(x + 5, y + 15, f"{rank}", "b on"))
            where = " ".join(f"{a[0]}{getattr(place, a)}" for a in axes)
            parts.append(_text(x + 5, y + 32, where, "s on"))
    return _svg(-(-len(picked) // per_row) * height, parts)


def _nodes_to_draw(plan: Plan) -> list[int]:
    """Return the first and the last node of each stage, as many as there is room for."""
    gpus = plan.job.gpus_per_node
    ends = [(stage.first_rank, stage.first_rank + stage.ranks - 1) for stage in plan.stages]
    return list(dict.fromkeys(rank // gpus for pair in ends for rank in pair))[:_MOST_NODES]


def legend(colours: dict[str, str], names: dict[str, str] | None = None) -> str:
    """Return coloured labels in a line."""
    spans = (
        f'<span class="key"><i style="background:{colour}"></i>{escape((names or {}).get(k, k))}'
        f"</span>"
        for k, colour in colours.items()
    )
    return f'<p class="legend">{"".join(spans)}</p>'


def _svg(height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" height="{height:.0f}" '
        f'role="img">{"".join(parts)}</svg>'
    )


def _box(
    x: float, y: float, width: float, height: float, colour: str, title: str, label: str = ""
) -> str:
    x, y, width, height = (round(value, 1) for value in (x, y, width, height))
    middle = (x + width / 2, y + height / 2 + 4)
    text = _text(*middle, label, "on", "middle") if label and width > 12 else ""
    return (
        f'<g><title>{escape(title)}</title><rect x="{x}" y="{y}" width="{width}" '
        f'height="{height}" rx="3" fill="{colour}"/>{text}</g>'
    )


def _text(x: float, y: float, text: str, classes: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="t {classes}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )
