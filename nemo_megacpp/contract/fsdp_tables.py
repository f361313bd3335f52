"""What Megatron's FSDP keeps on a rank, as a table and as plain data.

The document of ``plan --use-megatron-fsdp --json``, version 1; sizes in bytes, keys are
only ever added within a version::

    schema: 1
    job: as in a plan
    fsdp: {strategy: {parameters, gradients, main_parameters, moments, activations, total, fits}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from nemo_megacpp.contract.fsdp_memory import FsdpMemory
from nemo_megacpp.contract.layout_plan import SCHEMA, Plan, plan_document
from nemo_megacpp.render import Table, show_bytes

NOT_COUNTED = (
    "Not counted: what FSDP gathers and frees again (500 million parameters or more ahead, and "
    "1,000 million gradients or more before their reduction, if there are so many), temporaries, "
    "fragmentation, the communication library's buffers. The traffic and the time of a step under "
    "FSDP are not estimated."
)


def fsdp_table(plan: Plan, kept: Mapping[str, FsdpMemory]) -> Table:
    """Return what the rank that keeps most holds, by strategy.

    Args:
        plan: of one pipeline stage.
        kept: by ``data_parallel_sharding_strategy``.
    """
    limit, activations = plan.job.hbm_bytes, plan.fullest.memory.activations
    table = Table(
        (
            *("<data_parallel_sharding_strategy", "weights", "gradients", "float32 weights"),
            *("Adam's moments", "activations", "total", *(["of the GPU"] if limit else [])),
        ),
        "Memory of one rank under Megatron's FSDP (exact; activations by formula)",
    )
    for strategy, memory in kept.items():
        total = memory.total + activations
        table.add(
            strategy,
            show_bytes(memory.parameters),
            show_bytes(memory.gradients),
            show_bytes(memory.main_parameters),
            show_bytes(memory.moments),
            show_bytes(activations),
            show_bytes(total),
            *([f"{total / limit:.0%}"] if limit else []),
        )
    return table


def fsdp_document(plan: Plan, kept: Mapping[str, FsdpMemory]) -> dict[str, Any]:
    """Return the same as plain data; the arguments are those of `fsdp_table`."""
    limit, activations = plan.job.hbm_bytes, plan.fullest.memory.activations
    strategies = {}
    for strategy, memory in kept.items():
        total = memory.total + activations
        fits = None if limit is None else total <= limit
        strategies[strategy] = {
            **asdict(memory),
            "activations": activations,
            "total": total,
            "fits": fits,
        }
    return {"schema": SCHEMA, "job": plan_document(plan)["job"], "fsdp": strategies}
