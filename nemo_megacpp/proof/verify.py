"""Prove a layout on the hardware at hand: one axis at a time, family by family, then whole."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout, validate_layout
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.proof.axes import axes_alone, axes_in_pairs, axes_of, spelled_out
from nemo_megacpp.proof.bench import Bench, TrainingPath
from nemo_megacpp.proof.kernels import kernels_for
from nemo_megacpp.proof.proxy_model import proxy_model
from nemo_megacpp.proof.step_spec import Dtype
from nemo_megacpp.proof.trial import Trial
from nemo_megacpp.runtime.workers import WorkerPool, device_for

MAX_RANKS = 16


def verify(
    model: Mapping[str, Any],
    layout: ParallelLayout,
    shape_of: Callable[[Mapping[str, Any]], Any],
    path: TrainingPath,
    training: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
    pool: WorkerPool | None = None,
) -> Iterator[Trial]:
    """Yield trials, in order: each axis of ``layout`` alone, each family in it, everything in it.

    A layout of one axis is tried once.

    Args:
        model: fields of the recipe's ``HybridConfig``.
        layout: the layout to prove.
        shape_of: returns the sizes that the layout rules read.
        path: takes the steps, by what trains.
        training: fields of every :class:`StepSpec` that the recipe's training settles; with
            ``packed=True`` rows are packs of documents that every CP of ``layout`` can deal.
        progress: called with a line before each trial.
        pool: ranks to run on, left open; started and ended here if not given.

    Raises:
        UserError: for a layout that is illegal or needs more ranks than this machine should start.
    """
    if layout.world > MAX_RANKS:
        raise UserError(
            f"The layout needs {layout.world} ranks; verify starts at most {MAX_RANKS} here. Give "
            f"a smaller one with --layout: the axes are proved by their kind, not their size."
        )
    device = device_for(layout.world) if pool is None else pool.device
    small = proxy_model(model, layout, kernels_for(device, "bfloat16").narrowest)
    training = dict(training or {})
    if training.pop("packed", False):
        quarter = small["seq_length"] // 4
        training["documents"] = (2 * quarter, quarter, quarter)
    validate_layout(layout, shape_of(small))
    letters = "".join(dict.fromkeys(HybridPattern.parse(small["hybrid_pattern"]).letters))
    cases: list[tuple[str, str, ParallelLayout, Dtype]] = []
    cases += [("all", axis, single, "float64") for axis, single in axes_alone(layout)]
    for letter in letters if len(letters) > 1 else "":
        cases.append((letter, "together", axes_of(letter, layout), "float64"))
    alone = {spelled_out(single) for _, single in axes_alone(layout)}
    if spelled_out(layout) not in alone:
        cases.append(("all", "together", layout, "float64"))
    cases += [("all", "together", layout, "float32"), ("all", "together", layout, "bfloat16")]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if pool is None:
            pool = stack.enter_context(WorkerPool(layout.world, device=device))
        bench, axes = Bench(pool, path, folder, small, training), _Axes(layout, progress)
        for name, axis, place, dtype in cases:
            progress(f"{name} in {place.short()} ({dtype})")
            yield axes.blame(bench.run(name, axis, place, dtype), bench)


class _Axes:
    """Says which axis made a trial fail, from trials that move fewer of them."""

    def __init__(self, layout: ParallelLayout, progress: Callable[[str], None]):
        self._layout, self._progress = layout, progress
        self._alone: list[str] = []
        self._narrowed: dict[Dtype, str] = {}

    def blame(self, trial: Trial, bench: Bench) -> Trial:
        """Return ``trial`` with the axis in its finding, if it has one."""
        if trial.finding is None:
            return trial
        if trial.axis != "together":
            self._alone.append(trial.axis)
            axis = f"{trial.axis} alone"
        elif self._alone:
            axis = " and ".join(f"{axis} alone" for axis in self._alone)
        else:
            axis = self._narrow(trial.dtype, bench)
        finding = dataclasses.replace(trial.finding, axis=axis)
        return dataclasses.replace(trial, finding=finding)

    def _narrow(self, dtype: Dtype, bench: Bench) -> str:
        """Return the fewest axes that fail; each alone has been tried in float64."""
        if dtype not in self._narrowed:
            alone = axes_alone(self._layout)
            self._narrowed[dtype] = " with ".join(axis for axis, _ in alone)
            tried = [] if dtype == "float64" or len(alone) < 2 else alone
            for axes, place in tried + axes_in_pairs(self._layout):
                self._progress(f"all in {place.short()} ({dtype}), to see whether {axes} fails")
                if bench.run("all", axes, place, dtype).finding is not None:
                    self._narrowed[dtype] = axes
                    break
        return f"{self._narrowed[dtype]} (fewer axes agree)"
