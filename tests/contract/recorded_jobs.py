"""Jobs whose plan is compared with a recorded step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_megacpp.formulas.sizes import Job
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.record import Recorded, record_step

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "short_conv.py")
BALANCED = {"moe_router_topk": 8}  # every token to every expert: routing sends equal shares
SELECTIVE = {"recompute_granularity": "selective"}
FULL = {"recompute_granularity": "full"}


def job_of(model: dict[str, Any], layout: ParallelLayout, **changes: Any) -> Job:
    """Return four microbatches of two rows for each replica, in float32, with torch's kernels."""
    replicas = layout.data_parallel_size
    return Job(
        model,
        layout,
        **{
            "micro_batch_size": 2,
            "global_batch_size": 4 * replicas,
            "precision": "fp32",
            "kernels": "torch",
            **changes,
        },
    )


def recorded(ranks: WorkerPool, job: Job, **ddp: Any) -> list[Recorded]:
    """Run one step of a job; return what each rank held and sent.

    ``ddp`` are further fields of Megatron's ``DistributedDataParallelConfig``.
    """
    return ranks.run(job.layout.world, record_step, spec_of(job, **ddp), job.layout)


def spec_of(job: Job, **ddp: Any) -> StepSpec:
    """Return a step of a job."""
    overlap = {
        "overlap_grad_reduce": job.overlap_grad_reduce,
        "overlap_param_gather": job.overlap_param_gather,
    }
    return StepSpec(
        job.model,
        micro_batch_size=job.micro_batch_size,
        global_batch_size=job.global_batch_size,
        dtype="float32" if job.precision == "fp32" else "bfloat16",
        use_distributed_optimizer=job.use_distributed_optimizer,
        ddp={**overlap, **ddp},
    )


SIDE_CHANNELS: list[dict[str, Any]] = [
    {"name": "language", "vocab_size": 5, "field": "lang"},
    {"name": "bigram", "vocab_size": 24, "ngram": 2, "partition": "vocabulary"},
    {
        **{"name": "kind", "vocab_size": 7, "field": "kind", "owner": [0, 3]},
        **{"combine": "concat", "width": 10},
    },
    {
        **{"name": "trigram", "vocab_size": 28, "ngram": 3, "owner": [0, 2]},
        **{"partition": "vocabulary", "combine": "concat", "width": 6},
    },
]
