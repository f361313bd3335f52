"""A plan as one web page that needs nothing else: no script, no font, no file beside it."""

from __future__ import annotations

from html import escape

from nemo_megacpp.contract.picture import (
    END_COLOUR,
    MEMORY_COLOURS,
    family_colours,
    legend,
    memory_picture,
    nodes_picture,
    stages_picture,
)
from nemo_megacpp.contract.plan import Plan, StagePlan
from nemo_megacpp.contract.tables import (
    activation_table,
    collective_table,
    group_table,
    ownership_table,
    place_name,
    stage_table,
    traffic_table,
)
from nemo_megacpp.render import html_details, html_list, html_page, html_table, show_bytes


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
        html_table(stage_table(plan, plan.stages)),
        "<h2>Where ranks sit</h2>",
        '<p class="note">A cell is a rank, coloured by its stage, with its place on tp, cp and dp; '
        "the first and the last node of each stage.</p>",
        nodes_picture(plan),
        html_table(group_table(plan)),
        "<h2>What a rank sends in one step</h2>",
        *(_traffic(stage, stage is plan.fullest) for stage in plan.stages),
        "<h2>Who owns what</h2>",
        *(_family_details(plan, place) for place in plan.activations),
        "<h2>What this layout costs</h2>",
        html_list(f"<b>{c.axis}</b> {c.effect} {escape(c.message)}" for c in plan.costs),
    ]
    return html_page(title, sections)


def plan_summary(plan: Plan) -> str:
    """Return the pictures of stages and memory and what the layout costs, for another page."""
    return "\n".join(
        (
            f"<p>{plan.parameters:,} parameters; activations by formula.</p>",
            _stages(plan),
            _memory(plan),
            html_list(f"<b>{c.axis}</b> {c.effect} {escape(c.message)}" for c in plan.costs),
        )
    )


def _stages(plan: Plan) -> str:
    families = family_colours(plan)
    names = {**{letter: place_name(letter) for letter in families}, "": "embedding, head"}
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
