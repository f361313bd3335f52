"""Prove a layout on the hardware at hand: one axis at a time, family by family, then whole."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout, refuse_illegal
from nemo_megacpp.pattern import Family, HybridPattern
from nemo_megacpp.proof.canary import canary, one_family
from nemo_megacpp.proof.compare import FLOAT32, FLOAT64, Rung, compare
from nemo_megacpp.proof.step import StepSpec, round_trip, run_step, save_initial_weights
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool

MAX_RANKS = 16


@dataclass(frozen=True)
class Trial:
    """One model in one layout, against the same weights on one rank.

    Attributes:
        model: ``all``, or the letter of a family.
        axis: what the layout moves, or ``together``.
        layout: as text.
        dtype: of the parameters; float64 goes through a linear form of the logits, float32 through
            the loss.
        rungs: what was compared; empty if the layout could not be run.
        error: why it could not, or None.
    """

    model: str
    axis: str
    layout: str
    dtype: str
    rungs: tuple[Rung, ...] = ()
    error: str | None = None

    @property
    def holds(self) -> bool:
        """Whether every rung is within its tolerance."""
        return self.error is None and all(rung.holds for rung in self.rungs)


def verify(
    model: Mapping[str, Any],
    layout: ParallelLayout,
    shape_of: Callable[[Mapping[str, Any]], Any],
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[Trial]:
    """Yield trials, in order: each axis of ``layout`` alone, each family in it, everything in it.

    Args:
        model: fields of the recipe's ``HybridConfig``.
        layout: the layout to prove.
        shape_of: returns the sizes that the layout rules read.
        progress: called with a line before each trial.

    Raises:
        UserError: for a layout that is illegal or needs more ranks than this machine should start.
    """
    if layout.world > MAX_RANKS:
        raise UserError(
            f"The layout needs {layout.world} ranks; verify starts at most {MAX_RANKS} here. Give "
            f"a smaller one with --layout: the axes are proved by their kind, not their size."
        )
    small = canary(model, layout)
    refuse_illegal(layout, shape_of(small))
    letters = "".join(dict.fromkeys(HybridPattern.parse(small["hybrid_pattern"]).letters))
    cases = [("all", axis, single, "float64") for axis, single in axes_alone(layout)]
    for letter in letters if len(letters) > 1 else "":
        cases.append((letter, "together", _axes_of(letter, layout), "float64"))
    cases += [("all", "together", layout, dtype) for dtype in ("float64", "float32")]
    with WorkerPool(layout.world) as pool, tempfile.TemporaryDirectory() as folder:
        bench = _Bench(pool, Path(folder), small)
        for name, axis, place, dtype in cases:
            progress(f"{name} in {place.short()} ({dtype})")
            yield bench.run(name, axis, place, dtype)


def axes_alone(layout: ParallelLayout) -> list[tuple[str, ParallelLayout]]:
    """Return each axis that ``layout`` uses, in the smallest layout that moves it."""
    tp: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sp,
    }
    pp = {"pipeline_model_parallel_size": layout.pp}
    found: list[tuple[str, dict[str, Any]]] = []
    if layout.tp > 1:
        found.append(("TP", {**tp, "expert_tensor_parallel_size": layout.tp}))
    if layout.etp != layout.tp:
        found.append(("ETP", {**tp, "expert_tensor_parallel_size": layout.etp}))
    if layout.cp > 1:
        found.append(("CP", {"context_parallel_size": layout.cp}))
    if layout.ep > 1:
        found.append(("EP", {"expert_model_parallel_size": layout.ep}))
    if layout.pp > 1:
        found.append(("PP", pp))
    if layout.vpp is not None:
        found.append(("VPP", {**pp, "virtual_pipeline_model_parallel_size": layout.vpp}))
    alone = [(axis, ParallelLayout(**degrees)) for axis, degrees in found]
    return [(axis, place) for axis, place in alone if place.world <= layout.world]


def _axes_of(letter: str, layout: ParallelLayout) -> ParallelLayout:
    """Return ``layout`` for one family: the expert axes are E's alone, and data-parallel ranks
    take their place elsewhere."""
    if letter == Family.EXPERT.value:
        return layout
    return dataclasses.replace(
        layout,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=None,
        world_size=layout.world,
    )


class _Bench:
    """Runs trials; keeps the weights and the one-rank step of every model it has seen."""

    def __init__(self, pool: WorkerPool, folder: Path, small: Mapping[str, Any]):
        self.pool, self.folder, self.small = pool, folder, small
        self.references: dict[str, tuple[str, Any]] = {}

    def run(self, name: str, axis: str, layout: ParallelLayout, dtype: str) -> Trial:
        trial = Trial(name, axis, layout.short(), dtype)
        fields = dict(self.small)
        if name != "all":
            fields = one_family(self.small, name, layout)
        rows = 2 * layout.pp * layout.data_parallel_size
        spec = StepSpec(
            fields,
            micro_batch_size=1,
            global_batch_size=rows,
            objective="logits" if dtype == "float64" else "loss",
            dtype="float64" if dtype == "float64" else "float32",
        )
        try:
            weights, expected = self._reference(spec)
            result = self.pool.run(layout.world, run_step, spec, layout, weights)[0]
            rungs = compare(expected, result, FLOAT64 if dtype == "float64" else FLOAT32)
            rungs.append(self._round_trip(spec, layout, weights))
        except WorkerError as error:
            return dataclasses.replace(trial, error=str(error).strip().splitlines()[-1])
        return dataclasses.replace(trial, rungs=tuple(rungs))

    def _reference(self, spec: StepSpec) -> tuple[str, Any]:
        key = repr(spec)
        if key not in self.references:
            weights = str(self.folder / f"weights{len(self.references)}")
            one = ParallelLayout()
            self.pool.run(1, save_initial_weights, spec, one, weights)
            step = self.pool.run(1, run_step, spec, one, weights)[0]
            self.references[key] = weights, step
        return self.references[key]

    def _round_trip(self, spec: StepSpec, layout: ParallelLayout, weights: str) -> Rung:
        """Load in the layout, save there, load on one rank: bit for bit what was saved first."""
        again = tempfile.mkdtemp(dir=self.folder)
        self.pool.run(layout.world, round_trip, spec, layout, weights, again)
        one = ParallelLayout()
        first = self.pool.run(1, round_trip, spec, one, weights, None)[0]
        second = self.pool.run(1, round_trip, spec, one, again, None)[0]
        changed = [key for key, value in first.items() if second[key] != value]
        return Rung("checkpoint", float(len(changed)), 0.0, min(changed, default=""))
