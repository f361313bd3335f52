"""The proof sees a wrong step of one rank's shard, and parameters that the step did not reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.checks import FLOAT32, SEEDS, Limits, compare, rounding_limits
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_result import StepResult
from nemo_megacpp.proof.step_spec import Dtype, StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.path import run_step
from tests.proof.faults import run_broken
from tests.reference import Reference

WORLD = ParallelLayout.parse("world=2")


def _spec(dtype: Dtype) -> StepSpec:
    return StepSpec(tiny_model("AR"), dtype=dtype, use_distributed_optimizer=True)


@pytest.fixture(scope="module")
def limits(ranks: WorkerPool, reference: Reference) -> Callable[[Dtype], Limits]:
    """Return a function from a dtype to the limits of its step."""

    def of(dtype: Dtype) -> Limits:
        if dtype not in known:
            weights, expected = reference(_spec(dtype))
            args = (run_step, _spec(dtype), ParallelLayout(), weights, False)
            moved = [ranks.run(1, *args, seed)[0] for seed in SEEDS]
            known[dtype] = rounding_limits(expected, moved)
        return known[dtype]

    known: dict[Dtype, Limits] = {"float32": FLOAT32}
    return of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_in_shards(
    ranks: WorkerPool, reference: Reference, limits: Callable[[Dtype], Limits], dtype: Dtype
) -> None:
    """What is compared are float32 parameters, whole and as exact as one rank's."""
    weights, expected = reference(_spec(dtype))
    result: StepResult = ranks.run(2, run_step, _spec(dtype), WORLD, weights)[0]
    assert all(check.passed for check in compare(expected, result, limits(dtype)))
    for key, value in result.parameters.values.items():
        assert value.dtype == np.float32 and np.isfinite(value).all(), key
    halves = {key for key in result.parameters.replica_spread if key.endswith(" in bfloat16")}
    stay = {key for key in result.parameters.values if f"{key} in bfloat16" not in halves}
    assert bool(halves) == (dtype == "bfloat16")
    for key in result.parameters.values.keys() - stay:
        low = result.parameters.values[key].view(np.uint32) & 0xFFFF
        assert low.any(), f"{key}: the bfloat16 copy, not the main parameter"
    assert not any(result.parameters.replica_spread.values())


@pytest.mark.parametrize(
    ("fault", "dtype", "check", "where"),
    [
        ("step of a shard wrong by 1e-3", "float32", "step", ""),
        ("step of a shard wrong by 1e-3", "bfloat16", "step", ""),
        (
            "shard not copied to the parameters",
            "bfloat16",
            "replicas",
            " in bfloat16 after the step",
        ),
        ("gather of parameters not received", "float32", "replicas", " after the step"),
        (
            "gather of parameters not received",
            "bfloat16",
            "replicas",
            " in bfloat16 after the step",
        ),
    ],
)
def test_fault_is_named(
    ranks: WorkerPool,
    reference: Reference,
    limits: Callable[[Dtype], Limits],
    fault: str,
    dtype: Dtype,
    check: str,
    where: str,
) -> None:
    weights, expected = reference(_spec(dtype))
    args: Any = (fault, run_step, _spec(dtype), WORLD, weights)
    result: StepResult = ranks.run(2, run_broken, *args)[0]
    broken = [found for found in compare(expected, result, limits(dtype)) if not found.passed]
    assert [found.name for found in broken] == [check]
    assert broken[0].where.endswith(where)
