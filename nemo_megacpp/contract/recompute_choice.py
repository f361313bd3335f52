"""The form of recompute with which a layout fits: the one that computes least again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from nemo_megacpp.contract.layout_search import Search
from nemo_megacpp.formulas.recompute import MIXER_MODULES
from nemo_megacpp.formulas.sizes import Job
from nemo_megacpp.pattern import Family

SETTINGS = (
    "recompute_granularity",
    "recompute_modules",
    "recompute_method",
    "recompute_num_layers",
)


def recompute_forms(job: Job) -> list[dict[str, Any]]:
    """Return the forms of recompute to try, as fields of the model, in the order of what they
    compute again: the mixers of M and R, E and F as well, and all layers, one at a time."""
    present = set(job.config().pattern.families)

    def modules(*families: Family) -> list[str]:
        return [MIXER_MODULES[family.value] for family in families if family in present]

    mixers, others = (
        modules(Family.MAMBA, Family.RECURRENT),
        modules(Family.EXPERT, Family.FEED_FORWARD),
    )
    lists = [mixers, [*mixers, *others]] if others else [mixers]
    selective = [
        {"recompute_granularity": "selective", "recompute_modules": modules}
        for modules in lists
        if modules
    ]
    full = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    return [*selective, full]


def search_with_recompute(
    job: Job, search: Callable[[Job], Search]
) -> tuple[dict[str, Any], Job, Search] | None:
    """Return the first form with which a layout fits, the job with it, and its search; None if no
    layout fits with any.

    Args:
        job: whose own recompute is replaced.
        search: of the layouts of a job.
    """
    own = {name: value for name, value in job.model.items() if name not in SETTINGS}
    for form in recompute_forms(job):
        again = dataclasses.replace(job, model={**own, **form})
        found = search(again)
        if found.fitting:
            return form, again, found
    return None
