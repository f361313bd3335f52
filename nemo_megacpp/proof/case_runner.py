"""Run one case: a model in a layout, checked against the same weights on one rank."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.case_kernels import KernelsName, kernels_for
from nemo_megacpp.proof.checks import (
    FLOAT32,
    FLOAT64,
    SEEDS,
    Check,
    Limits,
    compare,
    rounding_limits,
)
from nemo_megacpp.proof.diagnosis import Diagnosis, diagnose
from nemo_megacpp.proof.small_models import every_expert, one_family
from nemo_megacpp.proof.step_result import Carried, StepResult, checkpoint_of
from nemo_megacpp.proof.step_spec import Dtype, StepSpec
from nemo_megacpp.runtime.rank_errors import describe_tracebacks
from nemo_megacpp.runtime.workers import WorkerError, WorkerPool

_ONE = ParallelLayout()


@dataclass(frozen=True)
class CaseResult:
    """One model in one layout, against the same weights on one rank.

    Attributes:
        model: ``all``, or the letter of a family.
        axis: what the layout moves, or ``together``.
        layout: as text.
        dtype: of the parameters; float64 goes through a linear form of the logits, float32 and
            bfloat16 through the loss.
        checks: what was compared; empty if the layout could not be run.
        error: why it could not, or None.
        diagnosis: where the numbers begin to differ, if a check failed.
        kernels: what it ran in (:class:`nemo_megacpp.proof.case_kernels.Kernels`).
    """

    model: str
    axis: str
    layout: str
    dtype: Dtype
    checks: tuple[Check, ...] = ()
    error: str | None = None
    diagnosis: Diagnosis | None = None
    kernels: KernelsName = "torch"

    @property
    def passed(self) -> bool:
        """Whether the layout ran and every check passed."""
        return self.error is None and all(check.passed for check in self.checks)


@dataclass(frozen=True)
class TrainingPath:
    """The functions that take a proof's steps: those of :mod:`nemo_megacpp.nemo.proof_run`, which
    this room does not import."""

    run_step: Callable[..., StepResult | None]
    train_and_save: Callable[..., Carried | None]
    resume_and_train: Callable[..., Carried | None]


@dataclass
class _Reference:
    """What is known of a model on one rank; steps and limits by whether they were traced."""

    spec: StepSpec
    steps: dict[bool, StepResult] = field(default_factory=dict)
    limits: dict[bool, Limits] = field(default_factory=dict)


class CaseRunner:
    """Runs cases; saves the weights and the one-rank step of every model for the next case.

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

    def run(self, name: str, axis: str, layout: ParallelLayout, dtype: Dtype) -> CaseResult:
        """Run the model ``name`` (``all`` or a family's letter) in ``layout``; if a check fails,
        run it again with the tensors inside the model recorded."""
        kernels = kernels_for(self.pool.device, dtype).name
        case = CaseResult(name, axis, layout.short(), dtype, kernels=kernels)
        fields = dict(self.small) if name == "all" else one_family(self.small, name, layout)
        rows = self.training.get("micro_batch_size", 1)
        spec = StepSpec(
            every_expert(fields) if dtype == "bfloat16" else fields,
            global_batch_size=2 * rows * layout.pp * layout.data_parallel_size,
            objective="logits" if dtype == "float64" else "loss",
            dtype=dtype,
            **self.training,
        )
        return self.prove(case, spec, spec, layout)

    def prove(
        self,
        case: CaseResult,
        spec: StepSpec,
        on_one_rank: StepSpec,
        layout: ParallelLayout,
        checkpoint: bool = True,
    ) -> CaseResult:
        """Return ``case`` with the checks of ``spec`` in ``layout`` against ``on_one_rank``.

        Args:
            case: what is compared, in words.
            spec: the step in the layout.
            on_one_rank: the step that it must equal; it may leave out what changes no number.
            layout: where the step is taken.
            checkpoint: also save there, and resume on one rank.
        """
        try:
            key = repr(on_one_rank)
            reference = self._references.setdefault(key, _Reference(on_one_rank))
            expected = self._reference_step(reference)
            if checkpoint:
                result, *saved = self._step_and_checkpoint(spec, expected, layout)
            else:
                result, saved = self._step(spec, layout, expected), []
            checks = (*compare(expected, result, self._limits(reference)), *saved)
            case = dataclasses.replace(case, checks=checks)
            if not case.passed:
                expected = self._reference_step(reference, trace=True)
                traced = self._step(spec, layout, expected, trace=True)
                limits = self._limits(reference, trace=True)
                diagnosis = diagnose(checks, expected, traced, limits)
                case = dataclasses.replace(case, diagnosis=diagnosis)
        except WorkerError as error:
            return dataclasses.replace(case, error=describe_tracebacks(str(error)))
        return case

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
        self, spec: StepSpec, expected: StepResult, layout: ParallelLayout
    ) -> tuple[StepResult, Check]:
        """Step in the layout, save there as a run does, and resume on one rank: the weights and the
        optimizer's state must be equal bit for bit. A layout that runs may still fail to save."""
        try:
            return self._saved_step(spec, expected, layout)
        except WorkerError as error:
            problem = describe_tracebacks(str(error))
            failed = Check("checkpoint", float("inf"), 0.0, problem=problem)
            return self._step(spec, layout, expected), failed

    def _saved_step(
        self, spec: StepSpec, expected: StepResult, layout: ParallelLayout
    ) -> tuple[StepResult, Check]:
        folder = tempfile.mkdtemp(dir=self.folder)
        args = (spec, layout, folder, spec.steps, expected.initial)
        saved: Carried = self.pool.run(layout.world, self.path.train_and_save, *args)[0]
        checkpoint = checkpoint_of(folder, spec.steps)
        resume = (self.path.resume_and_train, spec, _ONE, checkpoint, spec.steps)
        loaded: Carried = self.pool.run(1, *resume)[0]
        mine, found = saved.state.values, loaded.state.values
        changed = [k for k in mine if k not in found or not np.array_equal(mine[k], found[k])]
        assert saved.following is not None
        check = Check("checkpoint", float(len(changed)), 0.0, min(changed, default=""))
        return saved.following, check
