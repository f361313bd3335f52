"""Run one trial: a model in a layout against the same weights on one rank."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.compare import FLOAT32, FLOAT64, Limits, Rung, compare
from nemo_megacpp.proof.differences import find
from nemo_megacpp.proof.kernels import kernels_for
from nemo_megacpp.proof.proxy_model import every_expert, one_family
from nemo_megacpp.proof.reshard import Carried, checkpoint_of
from nemo_megacpp.proof.rounding import SEEDS, rounding_limits
from nemo_megacpp.proof.step import StepResult
from nemo_megacpp.proof.step_spec import Dtype, StepSpec
from nemo_megacpp.proof.trial import Trial
from nemo_megacpp.runtime.rank_errors import describe_tracebacks
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool

_ONE = ParallelLayout()


@dataclass(frozen=True)
class TrainingPath:
    """The functions that take a proof's steps, by whatever trains.

    They are those of :mod:`nemo_megacpp.nemo.proof_run`, which this package does not
    import: it is below NeMo's front end.
    """

    run_step: Callable[..., StepResult | None]
    train_and_save: Callable[..., Carried | None]
    resume_and_train: Callable[..., Carried | None]


@dataclass
class _Reference:
    """What is known of a model on one rank."""

    spec: StepSpec
    steps: dict[bool, StepResult] = field(default_factory=dict)
    limits: dict[bool, Limits] = field(default_factory=dict)


class Bench:
    """Runs trials; keeps the weights and the one-rank step of every model it has seen.

    Args:
        pool: as many ranks as the largest layout needs.
        path: takes the steps.
        folder: for checkpoints.
        small: fields of the proxy model's ``HybridConfig``.
        training: further fields of every :class:`StepSpec`: batch, masks, documents, optimizer.
    """

    def __init__(
        self,
        pool: WorkerPool,
        path: TrainingPath,
        folder: Path,
        small: Mapping[str, Any],
        training: Mapping[str, Any] | None = None,
    ):
        self.pool, self.path, self.folder, self.small = pool, path, folder, small
        self.training = dict(training or {})
        self._references: dict[str, _Reference] = {}

    def run(self, name: str, axis: str, layout: ParallelLayout, dtype: Dtype) -> Trial:
        """Run the model ``name`` (``all`` or a family's letter) in ``layout``, rung by rung; where
        one does not hold, run it again and look inside."""
        kernels = kernels_for(self.pool.device, dtype).name
        trial = Trial(name, axis, layout.short(), dtype, kernels=kernels)
        fields = dict(self.small) if name == "all" else one_family(self.small, name, layout)
        rows = self.training.get("micro_batch_size", 1)
        spec = StepSpec(
            every_expert(fields) if dtype == "bfloat16" else fields,
            global_batch_size=2 * rows * layout.pp * layout.data_parallel_size,
            objective="logits" if dtype == "float64" else "loss",
            dtype=dtype,
            **self.training,
        )
        try:
            reference = self._reference(spec)
            try:
                result, checkpoint = self._step_and_checkpoint(reference, layout)
            except WorkerError as error:  # what can be stepped may still not be saved
                result = self._step(spec, layout, self._reference_step(reference))
                problem = describe_tracebacks(str(error))
                checkpoint = Rung("checkpoint", float("inf"), 0.0, problem=problem)
            limits = self._limits(reference)
            rungs = compare(self._reference_step(reference), result, limits)
            rungs.append(checkpoint)
            trial = dataclasses.replace(trial, rungs=tuple(rungs))
            if not trial.holds:
                expected = self._reference_step(reference, trace=True)
                traced = self._step(spec, layout, expected, trace=True)
                limits = self._limits(reference, trace=True)
                trial = dataclasses.replace(trial, finding=find(rungs, expected, traced, limits))
        except WorkerError as error:
            return dataclasses.replace(trial, error=describe_tracebacks(str(error)))
        return trial

    def _reference(self, spec: StepSpec) -> _Reference:
        return self._references.setdefault(repr(spec), _Reference(spec))

    def _reference_step(self, reference: _Reference, trace: bool = False) -> StepResult:
        if trace not in reference.steps:
            start = reference.steps.get(not trace)
            reference.steps[trace] = self._step(reference.spec, _ONE, start, trace)
        return reference.steps[trace]

    def _step(
        self,
        spec: StepSpec,
        layout: ParallelLayout,
        reference: StepResult | None,
        trace: bool = False,
        perturb_seed: int | None = None,
    ) -> StepResult:
        weights = None if reference is None else reference.initial
        args = (spec, layout, weights, trace, perturb_seed)
        result: StepResult = self.pool.run(layout.world, self.path.run_step, *args)[0]
        return result if weights is None else dataclasses.replace(result, initial=weights)

    def _limits(self, reference: _Reference, trace: bool = False) -> Limits:
        if reference.spec.dtype != "bfloat16":
            return FLOAT64 if reference.spec.dtype == "float64" else FLOAT32
        if trace not in reference.limits:
            step = self._reference_step(reference, trace)
            moved = [self._step(reference.spec, _ONE, step, trace, seed) for seed in SEEDS]
            reference.limits[trace] = rounding_limits(step, moved)
        return reference.limits[trace]

    def _step_and_checkpoint(
        self, reference: _Reference, layout: ParallelLayout
    ) -> tuple[StepResult, Rung]:
        """Step in the layout, save there as a run does, and resume on one rank: bit for bit what
        was saved, of weights and optimizer."""
        spec, folder = reference.spec, tempfile.mkdtemp(dir=self.folder)
        weights = self._reference_step(reference).initial
        args = (spec, layout, folder, spec.steps, weights)
        saved: Carried = self.pool.run(layout.world, self.path.train_and_save, *args)[0]
        checkpoint = checkpoint_of(folder, spec.steps)
        resume = (self.path.resume_and_train, spec, _ONE, checkpoint, spec.steps)
        loaded: Carried = self.pool.run(1, *resume)[0]
        mine, found = saved.state.values, loaded.state.values
        changed = [k for k in mine if k not in found or not np.array_equal(mine[k], found[k])]
        assert saved.following is not None
        rung = Rung("checkpoint", float(len(changed)), 0.0, min(changed, default=""))
        return saved.following, rung
