"""Prove a layout on the hardware at hand: one axis at a time, family by family, then whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import combinations
from typing import Any

from nemo_megacpp.layout import ParallelLayout, validate_layout
from nemo_megacpp.pattern import Family, HybridPattern
from nemo_megacpp.proof.case_kernels import kernels_for
from nemo_megacpp.proof.case_runner import CaseResult, CaseRunner, TrainingPath
from nemo_megacpp.proof.rank_limit import validate_ranks
from nemo_megacpp.proof.small_models import proxy_model
from nemo_megacpp.proof.step_spec import Dtype
from nemo_megacpp.runtime.scratch import scratch_folder
from nemo_megacpp.runtime.workers import WorkerPool, device_for


def verify_layout(
    model: Mapping[str, Any],
    layout: ParallelLayout,
    shape_of: Callable[[Mapping[str, Any]], Any],
    path: TrainingPath,
    training: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
    pool: WorkerPool | None = None,
) -> Iterator[CaseResult]:
    """Run the cases in order: each axis of ``layout`` alone, each family in it, all families in it.

    A layout of one axis is run once.

    Args:
        model: fields of the recipe's ``HybridConfig``.
        layout: the layout to prove.
        shape_of: returns the sizes that the layout rules read.
        path: takes the steps.
        training: fields of every :class:`StepSpec` that the recipe's training settles; with
            ``packed=True`` rows are packs of documents that every CP of ``layout`` can split.
        progress: called with a line before each case.
        pool: ranks to run on, left open; started and ended here if not given.

    Raises:
        UserError: for a layout that is illegal or needs more ranks than this machine should start.
    """
    validate_ranks(layout, "verify", "what is proved")
    device = device_for(layout.world) if pool is None else pool.device
    small = proxy_model(model, layout, kernels_for(device, "bfloat16").narrowest)
    training = dict(training or {})
    if training.pop("packed", False):
        quarter = small["seq_length"] // 4
        training["documents"] = (2 * quarter, quarter, quarter)
    validate_layout(layout, shape_of(small))
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        if pool is None:
            pool = stack.enter_context(WorkerPool(layout.world, device=device))
        runner = CaseRunner(pool, path, folder, small, training)
        blame = _Blame(layout, runner, progress)
        for name, axis, place, dtype in _cases(small["hybrid_pattern"], layout):
            progress(f"{name} in {place.short()} ({dtype})")
            yield blame.name_axis(runner.run(name, axis, place, dtype))


def _cases(pattern: str, layout: ParallelLayout) -> list[tuple[str, str, ParallelLayout, Dtype]]:
    """Return model, axis, layout and dtype of each case."""
    alone = axes_alone(layout)
    cases: list[tuple[str, str, ParallelLayout, Dtype]] = []
    cases += [("all", axis, single, "float64") for axis, single in alone]
    letters = "".join(dict.fromkeys(HybridPattern.parse(pattern).letters))
    for letter in letters if len(letters) > 1 else "":
        cases.append((letter, "together", _axes_of(letter, layout), "float64"))
    if _spelled_out(layout) not in {_spelled_out(single) for _, single in alone}:
        cases.append(("all", "together", layout, "float64"))
    return [*cases, ("all", "together", layout, "float32"), ("all", "together", layout, "bfloat16")]


class _Blame:
    """Names the axis that makes a case fail, from cases that move fewer axes."""

    def __init__(self, layout: ParallelLayout, runner: CaseRunner, progress: Callable[[str], None]):
        self._layout, self._runner, self._progress = layout, runner, progress
        self._alone: list[str] = []
        self._narrowed: dict[Dtype, str] = {}

    def name_axis(self, case: CaseResult) -> CaseResult:
        """Return ``case`` with the axis in its diagnosis, if it has one."""
        if case.diagnosis is None:
            return case
        if case.axis != "together":
            self._alone.append(case.axis)
            axis = f"{case.axis} alone"
        elif self._alone:
            axis = " and ".join(f"{axis} alone" for axis in self._alone)
        else:
            axis = self._narrow(case.dtype)
        return dataclasses.replace(case, diagnosis=dataclasses.replace(case.diagnosis, axis=axis))

    def _narrow(self, dtype: Dtype) -> str:
        """Return the fewest axes that fail; each alone has been run in float64."""
        if dtype not in self._narrowed:
            alone = axes_alone(self._layout)
            self._narrowed[dtype] = " with ".join(axis for axis, _ in alone)
            fewer = [] if dtype == "float64" or len(alone) < 2 else alone
            for axes, place in fewer + axes_in_pairs(self._layout):
                self._progress(f"all in {place.short()} ({dtype}), to see whether {axes} fails")
                if self._runner.run("all", axes, place, dtype).diagnosis is not None:
                    self._narrowed[dtype] = axes
                    break
        return f"{self._narrowed[dtype]} (fewer axes agree)"


def axes_alone(layout: ParallelLayout) -> list[tuple[str, ParallelLayout]]:
    """Return each axis that ``layout`` uses, in the smallest layout that moves it."""
    alone = [(axis, ParallelLayout(**degrees)) for axis, degrees in _degrees(layout)]
    return [(axis, place) for axis, place in alone if place.world <= layout.world]


def axes_in_pairs(layout: ParallelLayout) -> list[tuple[str, ParallelLayout]]:
    """Return two axes at a time, where that is more than one of them and less than ``layout``."""
    known = {_spelled_out(place) for _, place in axes_alone(layout)} | {_spelled_out(layout)}
    pairs = []
    for (first, a), (second, b) in combinations(_degrees(layout), 2):
        place = ParallelLayout(**{**a, **b})
        if place.world <= layout.world and _spelled_out(place) not in known:
            known.add(_spelled_out(place))
            pairs.append((f"{first} with {second}", place))
    return pairs


def _spelled_out(layout: ParallelLayout) -> ParallelLayout:
    """Return ``layout`` with its defaults filled in, so that equal ones compare equal."""
    return dataclasses.replace(
        layout, expert_tensor_parallel_size=layout.etp, world_size=layout.world
    )


def _axes_of(letter: str, layout: ParallelLayout) -> ParallelLayout:
    """Return ``layout`` for one family: only E has the expert axes; other families use those ranks
    for data parallelism."""
    if letter == Family.EXPERT.value:
        return layout
    return dataclasses.replace(
        layout,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=None,
        world_size=layout.world,
    )


def _degrees(layout: ParallelLayout) -> list[tuple[str, dict[str, Any]]]:
    tp: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sp,
    }
    pp = {"pipeline_model_parallel_size": layout.pp}
    vpp = {**pp, "virtual_pipeline_model_parallel_size": layout.vpp}
    axes: list[tuple[str, bool, dict[str, Any]]] = [
        ("TP", layout.tp > 1, {**tp, "expert_tensor_parallel_size": layout.tp}),
        ("ETP", layout.etp != layout.tp, {**tp, "expert_tensor_parallel_size": layout.etp}),
        ("CP", layout.cp > 1, {"context_parallel_size": layout.cp}),
        ("EP", layout.ep > 1, {"expert_model_parallel_size": layout.ep}),
        ("PP", layout.pp > 1, pp),
        ("VPP", layout.vpp is not None, vpp),
        ("DP", layout.data_parallel_size > 1, {"world_size": layout.data_parallel_size}),
    ]
    return [(name, degrees) for name, used, degrees in axes if used]
