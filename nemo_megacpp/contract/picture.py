"""The pictures of a plan's web page, as SVG: stages with their blocks, memory, and nodes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nemo_megacpp.contract.plan import Plan
from nemo_megacpp.contract.tables import rank_range
from nemo_megacpp.formulas.placement import sizes_of
from nemo_megacpp.render import show_bytes

FAMILY_COLOURS = {"A": "#4c78a8", "M": "#54a24b", "E": "#f58518", "R": "#b279a2"}
END_COLOUR = "#9d9da1"
MEMORY_COLOURS = {
    "parameters": "#4c78a8",
    "gradients": "#72b7b2",
    "optimizer": "#eeca3b",
    "activations": "#e45756",
}
_ADDED_COLOURS = ("#bab0ac", "#d37295", "#fabfd2", "#9c755f", "#59a14f", "#edc948")
"""Of families that a user adds, in the order of their letters."""
_STAGE_COLOURS = ("#35455e", "#7a8ba5", "#4f6f6b", "#93aca6", "#6b5b4d", "#a8998a")
"""Other colours than the families': a stage is not a family."""
_WIDTH = 1080
_LEFT = 150
_MOST_STAGES = 64
_MOST_NODES = 16


def family_colours(plan: Plan) -> dict[str, str]:
    """Return the colour of each family of the model, by letter, the built-in ones first."""
    present = set(plan.sizes.config.pattern.letters)
    added = sorted(present - FAMILY_COLOURS.keys())
    return {
        **{letter: colour for letter, colour in FAMILY_COLOURS.items() if letter in present},
        **{x: _ADDED_COLOURS[n % len(_ADDED_COLOURS)] for n, x in enumerate(added)},
    }


def stages_picture(plan: Plan) -> str:
    """Draw each stage as a row of blocks, in the order in which its chunks run."""
    stages, colours = plan.stages[:_MOST_STAGES], family_colours(plan)
    longest = max(
        sum(len(c.letters) + c.owns_embedding + c.owns_head for c in stage.built.chunks)
        + len(stage.built.chunks)
        for stage in stages
    )
    step = min(40.0, (_WIDTH - _LEFT) / longest)
    parts = []
    for row, stage in enumerate(stages):
        y, x = row * 44, float(_LEFT)
        ranks = "rank" if stage.ranks == 1 else "ranks"
        parts.append(_text(0, y + 16, f"stage {stage.pp_rank}", bold=True))
        parts.append(_text(0, y + 31, f"{ranks} {rank_range(stage)}", small=True))
        for chunk in stage.built.chunks:
            blocks = [("embedding", "in", END_COLOUR)] if chunk.owns_embedding else []
            blocks += [
                (f"layer {layer}, {letter}", letter, colours[letter])
                for layer, letter in zip(chunk.layers, chunk.letters, strict=True)
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
        parts.append(_text(0, y + 18, f"stage {stage.pp_rank}", bold=True))
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
        parts.append(_text(at, height + 14, f"GPU: {show_bytes(limit)}", small=True, end=True))
    return _svg(len(stages) * 34 + (20 if limit else 0), parts)


def nodes_picture(plan: Plan) -> str:
    """Draw the first nodes of each stage, a cell for each rank with its place on tp, cp and dp."""
    gpus, layout = plan.job.gpus_per_node, plan.job.layout
    picked = _nodes_to_draw(plan)
    per_row = max(1, _WIDTH // (min(gpus, 8) * 62 + 24))
    axes = [axis for axis in ("tp", "cp", "dp") if sizes_of(layout)[axis] > 1]
    rows_of_node = -(-min(gpus, 64) // 8)
    height = rows_of_node * 46 + 34
    parts = []
    for index, node in enumerate(picked):
        left = (index % per_row) * (min(gpus, 8) * 62 + 24)
        top = index // per_row * height
        parts.append(_text(left, top + 12, f"node {node}", bold=True))
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
            parts.append(_text(x + 5, y + 15, f"{rank}", bold=True, on_colour=True))
            where = " ".join(f"{a[0]}{getattr(place, a)}" for a in axes)
            parts.append(_text(x + 5, y + 32, where, small=True, on_colour=True))
    return _svg(-(-len(picked) // per_row) * height, parts)


def _nodes_to_draw(plan: Plan) -> list[int]:
    """Return the first and the last node of each stage, as many as there is room for."""
    gpus = plan.job.gpus_per_node
    found: list[int] = []
    for stage in plan.stages:
        last = stage.first_rank + stage.ranks - 1
        found += [stage.first_rank // gpus, last // gpus]
    return list(dict.fromkeys(found))[:_MOST_NODES]


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
    text = ""
    if label and width > 12:
        text = (
            f'<text x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="middle" '
            f'class="t on">{escape(label)}</text>'
        )
    return (
        f'<g><title>{escape(title)}</title><rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" rx="3" fill="{colour}"/>{text}</g>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    bold: bool = False,
    small: bool = False,
    end: bool = False,
    on_colour: bool = False,
) -> str:
    names = " ".join(
        name for name, on in (("t", True), ("b", bold), ("s", small), ("on", on_colour)) if on
    )
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{names}"{anchor}>{escape(text)}</text>'
