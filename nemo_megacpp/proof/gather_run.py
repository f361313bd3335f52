"""Run the proxy model of a recipe in its layout, and report the gathers that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.layout import ParallelLayout, validate_layout
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.proof.case_kernels import kernels_for
from nemo_megacpp.proof.gather_recorder import RecordedGather
from nemo_megacpp.proof.gather_report import GatherRow, gather_rows
from nemo_megacpp.proof.gather_verdicts import judge
from nemo_megacpp.proof.rank_limit import validate_ranks
from nemo_megacpp.proof.small_models import every_expert, proxy_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool

Record = Callable[[StepSpec, ParallelLayout], list[RecordedGather]]
"""Takes a step on every rank and returns the rank's gathers."""


def inspect_gathers(
    model: Mapping[str, Any],
    layout: ParallelLayout,
    shape_of: Callable[[Mapping[str, Any], int], Any],
    record: Record,
    training: Mapping[str, Any],
    pool: WorkerPool | None = None,
) -> list[GatherRow]:
    """Record one step of the proxy model, and return its gathers in the order of the depth.

    Every token goes to every expert, so that no expert is without tokens. The optimizer is not
    distributed: its gathers of parameters come once per step, and no layer asks for them.

    Args:
        model: fields of the recipe's ``HybridConfig``.
        layout: to inspect.
        shape_of: returns the sizes that the layout rules read, from fields and the rows of a step.
        record: takes the step.
        training: ``micro_batch_size`` and ``precision`` of the recipe, for its bytes, and
            ``packed``, whether rows are packs.
        pool: CPU ranks to run on, left open; started and ended here if not given.

    Raises:
        UserError: for a layout that is illegal or needs more ranks than this machine should start.
    """
    validate_ranks(layout, "gathers", "which gathers there are")
    small = every_expert(proxy_model(model, layout, kernels_for("cpu", "float32").narrowest))
    rows = layout.pp * layout.data_parallel_size
    validate_layout(layout, shape_of(small, rows))
    quarter = small["seq_length"] // 4
    documents = (2 * quarter, quarter, quarter) if training["packed"] else ()
    spec = StepSpec(small, global_batch_size=rows, documents=documents)
    with ExitStack() as stack:
        if pool is None:
            pool = stack.enter_context(WorkerPool(layout.world))
        records = pool.run(layout.world, record, spec, layout)
    judged = judge(records, layout)
    families = dict.fromkeys(HybridPattern.parse(small["hybrid_pattern"]).families)
    if not all(block_of(family).is_priced for family in families):
        return gather_rows(judged, None, None)
    proxy = Job(small, layout, 1, rows, "fp32", kernels="torch")
    rows = training["micro_batch_size"] * layout.data_parallel_size
    real = Job(
        dict(model),
        layout,
        training["micro_batch_size"],
        rows,
        training["precision"],
        kernels="torch",
    )
    return gather_rows(judged, Sizes(proxy), Sizes(real))
