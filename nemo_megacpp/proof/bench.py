"""Run one trial: a model in a layout against the same weights on one rank."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.canary import every_expert, one_family
from nemo_megacpp.proof.compare import FLOAT32, FLOAT64, Limits, Rung, compare
from nemo_megacpp.proof.differences import find
from nemo_megacpp.proof.kernels import kernels_for
from nemo_megacpp.proof.rounding import SEEDS, rounding_limits
from nemo_megacpp.proof.step import (
    StepResult,
    StepSpec,
    round_trip,
    run_step,
    save_initial_weights,
)
from nemo_megacpp.proof.step_spec import Dtype
from nemo_megacpp.proof.trial import Trial
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool

_ONE = ParallelLayout()


@dataclass
class _Reference:
    """What is known of a model on one rank."""

    spec: StepSpec
    weights: str
    digests: dict[str, str]
    steps: dict[bool, StepResult] = field(default_factory=dict)
    limits: dict[bool, Limits] = field(default_factory=dict)


class Bench:
    """Runs trials; keeps the weights and the one-rank step of every model it has seen.

    Args:
        pool: as many ranks as the largest layout needs.
        folder: for checkpoints.
        small: fields of the canary's ``HybridConfig``.
    """

    def __init__(self, pool: WorkerPool, folder: Path, small: Mapping[str, Any]):
        self.pool, self.folder, self.small = pool, folder, small
        self._references: dict[str, _Reference] = {}

    def run(self, name: str, axis: str, layout: ParallelLayout, dtype: Dtype) -> Trial:
        """Run the model ``name`` (``all`` or a family's letter) in ``layout``, rung by rung; where
        one does not hold, run it again and look inside."""
        kernels = kernels_for(self.pool.device, dtype).name
        trial = Trial(name, axis, layout.short(), dtype, kernels=kernels)
        fields = dict(self.small) if name == "all" else one_family(self.small, name, layout)
        spec = StepSpec(
            every_expert(fields) if dtype == "bfloat16" else fields,
            micro_batch_size=1,
            global_batch_size=2 * layout.pp * layout.data_parallel_size,
            objective="logits" if dtype == "float64" else "loss",
            dtype=dtype,
        )
        try:
            reference = self._reference(spec)
            result = self._step(spec, layout, reference.weights)
            limits = self._limits(reference)
            rungs = compare(self._reference_step(reference), result, limits)
            rungs.append(self._round_trip(reference, layout))
            trial = dataclasses.replace(trial, rungs=tuple(rungs))
            if not trial.holds:
                traced = self._step(spec, layout, reference.weights, trace=True)
                limits = self._limits(reference, trace=True)
                expected = self._reference_step(reference, trace=True)
                trial = dataclasses.replace(trial, finding=find(rungs, expected, traced, limits))
        except WorkerError as error:
            return dataclasses.replace(trial, error=str(error).strip().splitlines()[-1])
        return trial

    def _reference(self, spec: StepSpec) -> _Reference:
        key = repr(spec)
        if key not in self._references:
            weights = str(self.folder / f"weights{len(self._references)}")
            self.pool.run(1, save_initial_weights, spec, _ONE, weights)
            digests = self.pool.run(1, round_trip, spec, _ONE, weights, None)[0]
            self._references[key] = _Reference(spec, weights, digests)
        return self._references[key]

    def _step(
        self,
        spec: StepSpec,
        layout: ParallelLayout,
        weights: str,
        trace: bool = False,
        perturb_seed: int | None = None,
    ) -> StepResult:
        args = (spec, layout, weights, trace, perturb_seed)
        return self.pool.run(layout.world, run_step, *args)[0]

    def _reference_step(self, reference: _Reference, trace: bool = False) -> StepResult:
        if trace not in reference.steps:
            step = self._step(reference.spec, _ONE, reference.weights, trace)
            reference.steps[trace] = step
        return reference.steps[trace]

    def _limits(self, reference: _Reference, trace: bool = False) -> Limits:
        if reference.spec.dtype != "bfloat16":
            return FLOAT64 if reference.spec.dtype == "float64" else FLOAT32
        if trace not in reference.limits:
            moved = [
                self._step(reference.spec, _ONE, reference.weights, trace, seed) for seed in SEEDS
            ]
            step = self._reference_step(reference, trace)
            reference.limits[trace] = rounding_limits(step, moved)
        return reference.limits[trace]

    def _round_trip(self, reference: _Reference, layout: ParallelLayout) -> Rung:
        """Load in the layout, save there, load on one rank: bit for bit what was saved first."""
        spec, again = reference.spec, tempfile.mkdtemp(dir=self.folder)
        self.pool.run(layout.world, round_trip, spec, layout, reference.weights, again)
        saved = self.pool.run(1, round_trip, spec, _ONE, again, None)[0]
        changed = [key for key, value in reference.digests.items() if saved[key] != value]
        return Rung("checkpoint", float(len(changed)), 0.0, min(changed, default=""))
