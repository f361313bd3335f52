"""What a run's layout splits, holds and costs, as a part of its page."""

from __future__ import annotations

from html import escape

from nemo_megacpp.contract.plan import make_plan
from nemo_megacpp.contract.report_html import plan_summary
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.plan import job_of
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.recipes.report import Section
from nemo_megacpp.runtime.host import current_host


def plan_section(recipe: Recipe) -> Section:
    """Return the plan of ``recipe`` with the kernels of this machine: stages, blocks, memory."""
    kernels = "torch" if current_host().device == "cpu" else "gpu"
    try:
        html = plan_summary(make_plan(job_of(recipe, kernels=kernels)))
    except UserError as reason:
        html = f"<p>{escape(str(reason))}</p>"
    return Section("Plan", html)
