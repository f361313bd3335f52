"""Tasks of one process give the numbers, and find the state, that each would alone."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.bare import save_initial_weights
from nemo_megacpp.proof.cases import tiny_model
from nemo_megacpp.proof.step import StepResult
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.recipes.nemo.proof_run import run_step
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import Job, WorkerPool

# Every family, an auxiliary loss, and dropout, which takes its numbers from Megatron's tracker.
_MODEL = tiny_model("AEMR", hidden_dropout=0.1, attention_dropout=0.1)
_CASES = (
    (StepSpec(_MODEL, dtype="bfloat16"), ("tp=2,etp=1", "ep=2")),
    (StepSpec(_MODEL, use_distributed_optimizer=True), ("tp=2,etp=1", "world=2")),
    (StepSpec(tiny_model("AEMR", mode="mamba3"), documents=(4, 12)), ("cp=2", "tp=2,etp=1")),
)
# Filled at the first use, and no number depends on them.
_HARMLESS = {
    "megatron.core.dist_checkpointing.strategies.base.default_strategies",  # by format, not by job
    "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream",
}


def _numbers(result: StepResult) -> dict[str, Any]:
    return {
        "objective": result.objective,
        "grad_norm": result.grad_norm,
        **result.aux_losses,
        **{f"gradient of {key}": value for key, value in result.gradients.values.items()},
        **{f"{key} after the step": value for key, value in result.parameters.values.items()},
    }


def test_numbers_are_those_of_a_process_of_its_own(ranks: WorkerPool, tmp_path: Any) -> None:
    """Bit for bit, over families, dtypes, layouts, dropout and the distributed optimizer."""
    jobs: list[Job] = []
    for index, (spec, layouts) in enumerate(_CASES):
        weights = str(tmp_path / f"weights{index}")
        ranks.run(1, save_initial_weights, spec, ParallelLayout(), weights)
        jobs += [(run_step, (spec, ParallelLayout.parse(text), weights)) for text in layouts]
    together = ranks.run_many(2, [*jobs, *reversed(jobs)])
    forwards, backwards = together[: len(jobs)], together[: len(jobs) - 1 : -1]
    for (task, args), *found in zip(jobs, forwards, backwards, strict=True):
        alone = _numbers(ranks.run(2, task, *args)[0])
        for outcome in found:
            assert isinstance(outcome, list), outcome
            numbers = _numbers(outcome[0])
            assert numbers.keys() == alone.keys()
            for name, value in alone.items():
                assert np.array_equal(numbers[name], value), (args[1], name)


def _global_state() -> dict[str, str]:
    """Return all plain variables of Megatron's and NeMo's modules and classes, as text."""
    state = {"torch's generator": str(torch.get_rng_state().sum())}
    for name, module in list(sys.modules.items()):
        if name.startswith(("megatron.core", "nemo.utils.app_state")):
            for key, value in _variables(module).items():
                state[f"{name}.{key}"] = _text(value)
                if isinstance(value, type) and value.__module__ == name:
                    of_class = _variables(value).items()
                    state.update({f"{name}.{key}.{k}": _text(v) for k, v in of_class})
    return state


def _variables(owner: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(owner).items() if not k.startswith("__")}


def _text(value: Any) -> str:
    if callable(value) or isinstance(value, (property, classmethod, staticmethod)):
        return "code"  # which CleanState does replace
    if value is None or isinstance(value, (bool, int, float, str, tuple, list, dict, set)):
        return str(value)
    return str(value) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _leave_a_mess() -> None:
    """Train a step, through which Megatron sets much of its state, and the rest by hand."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.rerun_state_machine import initialize_rerun_state_machine
    from nemo.utils import AppState

    init_num_microbatches_calculator(0, None, 4, 1, 1)
    initialize_rerun_state_machine()
    AppState().model_parallel_size = 2
    parallel_state.set_tensor_model_parallel_rank(1)
    np.random.rand()


def test_state_is_that_of_a_process_of_its_own(ranks: WorkerPool, tmp_path: Any) -> None:
    """Whatever Megatron keeps in a module: a new variable that a step sets fails here too."""
    spec, layout = _CASES[0][0], ParallelLayout.parse("tp=2,etp=1")
    weights = str(tmp_path / "weights")
    ranks.run(1, save_initial_weights, spec, ParallelLayout(), weights)
    step, look = (run_step, (spec, layout, weights)), (_global_state, ())
    before, _, after, _, _, last = ranks.run_many(
        2, [look, step, look, (_leave_a_mess, ()), step, look]
    )
    for then in (after, last):
        for rank in range(2):
            changed = {
                key: (value, then[rank].get(key))
                for key, value in before[rank].items()
                if then[rank].get(key) != value and key not in _HARMLESS
            }
            assert not changed, changed


def _groups(layout: str, twice: bool = False) -> tuple[list[int], int, int]:
    """Return the tensor-parallel ranks, the group's identity and the number of all groups."""
    start_model_parallel(ParallelLayout.parse(layout))
    if twice:
        start_model_parallel(ParallelLayout.parse(layout))
    group = parallel_state.get_tensor_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    return ranks, id(group), len(torch.distributed.distributed_c10d._world.pg_map)


def test_groups_of_a_layout_are_created_once(ranks: WorkerPool) -> None:
    jobs = [(_groups, (text,)) for text in ("tp=2", "cp=2", "tp=2")]
    first, other, again = (outcome[0] for outcome in ranks.run_many(2, jobs))
    assert (first[0], other[0], again[0]) == ([0, 1], [0], [0, 1])
    assert again[1] == first[1] and again[2] == other[2] > first[2]


def test_a_layout_is_still_started_once_per_task(ranks: WorkerPool) -> None:
    """As in a process of its own, where Megatron asserts it."""
    jobs = [(_groups, ("tp=2",)), (_groups, ("tp=2", True)), (_groups, ("tp=2",))]
    first, error, last = ranks.run_many(2, jobs)
    assert isinstance(first, list) and isinstance(last, list)
    with pytest.raises(Exception, match="AssertionError"):
        raise error
