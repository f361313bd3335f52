"""A long-context ladder: from a canary on one rank to the split sequence, one change at a time.

The sequence doubles; then TP, SP, CP, packs and recompute are added, each to what the rungs below
have. Every rung is held to its own model, weights and rows on one rank, so a fault belongs to the
rung that shows it first.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_megacpp.errors import UserError
from nemo_megacpp.formulas.recompute import MIXER_MODULES
from nemo_megacpp.layout import ModelShape, ParallelLayout, check_layout, describe_violations
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.proof.case_kernels import kernels_for
from nemo_megacpp.proof.case_runner import CaseResult, CaseRunner, TrainingPath
from nemo_megacpp.proof.small_models import proxy_model
from nemo_megacpp.proof.step_spec import Dtype, StepSpec
from nemo_megacpp.runtime.rank_errors import describe_tracebacks
from nemo_megacpp.runtime.scratch import scratch_folder
from nemo_megacpp.runtime.workers import Device, WorkerError, WorkerPool

START = 64
"""Tokens of the first rung, where the layout can split them."""
DOUBLINGS = 2
ROWS = 2
"""Rows of a step, in microbatches of one: a pack is one row."""
TIMED = 3
"""Steps whose median is the speed of a rung."""
_PARTS = 4
"""A pack is a half, a quarter and a quarter of its row."""

Gauge = Callable[..., tuple[int, list[float]]]
"""Takes steps of a spec in a layout, and returns this rank's peak bytes and seconds of each step:
:func:`nemo_megacpp.nemo.proof_run.measure_steps`, which this room does not import."""


@dataclass(frozen=True)
class Rung:
    """A model in a layout.

    Attributes:
        name: what it adds to the rung below.
        layout: where it runs.
        model: fields of ``HybridConfig``.
        documents: lengths of the documents that each row packs; empty for one document.
    """

    name: str
    layout: ParallelLayout
    model: Mapping[str, Any]
    documents: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of a row."""
        length: int = self.model["seq_length"]
        return length

    def step(self, dtype: Dtype, **fields: Any) -> StepSpec:
        """Return the step that it takes."""
        return StepSpec(
            dict(self.model),
            global_batch_size=ROWS,
            objective="logits" if dtype == "float64" else "loss",
            dtype=dtype,
            documents=self.documents,
            **fields,
        )


@dataclass(frozen=True)
class RungResult:
    """What a rung gave.

    Attributes:
        rung: the rung.
        case: its checks against one rank, or why it could not run.
        peaks: most bytes of each rank's tensors in a step.
        seconds: of a step, the median of the slowest rank's; None where the rung failed.
    """

    rung: Rung
    case: CaseResult
    peaks: tuple[int, ...] = ()
    seconds: float | None = None

    @property
    def passed(self) -> bool:
        """Whether it ran and every check passed."""
        return self.case.passed

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of a step over its seconds."""
        return None if self.seconds is None else ROWS * self.rung.tokens / self.seconds


@dataclass(frozen=True)
class Ladder:
    """The rungs of a recipe, lowest first.

    Attributes:
        rungs: each has one change more than the one below.
        left_out: what the number of ranks does not allow, in words.
    """

    rungs: tuple[Rung, ...]
    left_out: tuple[str, ...] = ()


def build_ladder(
    model: Mapping[str, Any],
    layout: ParallelLayout,
    shape_of: Callable[[Mapping[str, Any]], ModelShape],
    device: Device,
    ranks: int,
    start: int | None = None,
    doublings: int = DOUBLINGS,
) -> Ladder:
    """Return the ladder of a recipe.

    Args:
        model: fields of the recipe's ``HybridConfig``, with ``m2rnn_num_heads`` given.
        layout: gives the degrees of TP, CP and ETP; TP and CP of 1 become 2, as a degree of 1 is no
            rung. EP and PP are no axes of the sequence and stay 1.
        shape_of: returns the sizes that the layout rules read.
        device: decides which widths the proxy model may have.
        ranks: the most that a rung may need; an axis that needs more is left out.
        start: tokens of the first rung; None: ``START``, or more if the degrees need it.
        doublings: how often the sequence doubles.

    Raises:
        UserError: a first sequence that the degrees do not divide.
    """
    own = {name: value for name, value in model.items() if not name.startswith("recompute_")}
    again = {name: value for name, value in model.items() if name.startswith("recompute_")}
    tp, cp, left_out = _degrees(layout, ranks)
    top = ParallelLayout(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        context_parallel_size=cp,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size if tp > 1 else None,
    )
    pattern = str(model["hybrid_pattern"]).replace("|", "")  # cuts belong to a pipeline
    widths = kernels_for(device, "bfloat16").narrowest
    small = proxy_model({**own, "hybrid_pattern": pattern}, top, widths)
    small["seq_length"] = _start(start, math.lcm(small["seq_length"], 2 * cp * _PARTS))

    one = ParallelLayout()
    found = [Rung("canary", one, small)]
    for _ in range(doublings):
        small = {**small, "seq_length": 2 * small["seq_length"]}
        found.append(Rung("sequence x2", one, small))
    for name, place in _axes(top, shape_of(small)):
        found.append(Rung(name, place, small))
    half = small["seq_length"] // 2
    documents = (half, half // 2, half // 2)
    found.append(Rung("packs", top, small, documents))
    form = again if again.get("recompute_granularity") else _recompute(pattern)
    found.append(Rung("recompute", top, {**small, **form}, documents))
    return Ladder(tuple(found), left_out)


def _degrees(layout: ParallelLayout, ranks: int) -> tuple[int, int, tuple[str, ...]]:
    """Return TP and CP that fit ``ranks``, and what is left out."""
    tp, cp = max(layout.tp, 2), max(layout.cp, 2)
    left_out = []
    if tp > ranks:
        left_out.append(f"TP and SP: TP={tp} needs {tp} ranks, there are {ranks}")
        tp = 1
    if tp * cp > ranks:
        left_out.append(f"CP: TP={tp} CP={cp} needs {tp * cp} ranks, there are {ranks}")
        cp = 1
    return tp, cp, tuple(left_out)


def _start(start: int | None, unit: int) -> int:
    if start is None:
        return -(-START // unit) * unit
    if start % unit:
        near = [choice for choice in (start // unit * unit, (start // unit + 1) * unit) if choice]
        raise UserError(
            f"--start {start} must be a multiple of {unit}, so that the degrees and packs of this "
            f"ladder divide it. Use {' or '.join(map(str, near))}."
        )
    return start


def _axes(top: ParallelLayout, shape: ModelShape) -> Iterator[tuple[str, ParallelLayout]]:
    """Yield the layouts from one rank to ``top``, one axis at a time."""
    dense = dataclasses.replace(top, context_parallel_size=1)
    bare = dataclasses.replace(dense, sequence_parallel=False)
    if top.tp > 1:
        # Megatron's MoELayer does not train at TP > 1 without SP: the two are one change there.
        if any(item.rule == "experts-need-sp" for item in check_layout(bare, shape)):
            yield "TP with SP", dense
        else:
            yield from (("TP", bare), ("SP", dense))
    if top.cp > 1:
        yield "CP", top


def _recompute(pattern: str) -> dict[str, Any]:
    """Return the recompute of the mixers of M, E and R, or of all layers of a pattern of others."""
    letters = dict.fromkeys(HybridPattern.parse(pattern).letters)
    modules = [MIXER_MODULES[letter] for letter in letters if letter in MIXER_MODULES]
    if modules:
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }


def climb(
    rungs: Sequence[Rung],
    shape_of: Callable[[Mapping[str, Any]], ModelShape],
    path: TrainingPath,
    gauge: Gauge,
    pool: WorkerPool,
    precision: Dtype,
    training: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[RungResult]:
    """Run the rungs in order, up to and including the first that fails.

    Args:
        rungs: of `build_ladder`.
        shape_of: returns the sizes that the layout rules read.
        path: takes the steps that are compared, in float64.
        gauge: takes the steps that are measured.
        pool: as many ranks as the largest layout needs.
        precision: of the steps that are measured.
        training: further fields of every :class:`StepSpec`.
        progress: called with a line before each rung.
    """
    fields = dict(training or {})
    with scratch_folder() as folder:
        runner = CaseRunner(pool, path, folder, {})
        for rung in rungs:
            where = f"{rung.layout.short()}, {rung.tokens:,} tokens"
            progress(f"{rung.name}: {where}")
            result = _run(rung, shape_of(rung.model), runner, gauge, precision, fields)
            yield result
            if not result.passed:
                return


def _run(
    rung: Rung,
    shape: ModelShape,
    runner: CaseRunner,
    gauge: Gauge,
    precision: Dtype,
    fields: Mapping[str, Any],
) -> RungResult:
    case = CaseResult("all", rung.name, rung.layout.short(), "float64")
    if violations := check_layout(rung.layout, shape):
        reason = describe_violations(rung.layout, shape, violations)
        return RungResult(rung, dataclasses.replace(case, error=reason))
    model = {k: v for k, v in rung.model.items() if not k.startswith("recompute_")}
    plain = dataclasses.replace(rung, model=model)  # what one rank computes needs no recompute
    exact = {"loss_mask": "uneven", **fields}
    case = runner.prove(
        case,
        rung.step("float64", **exact),
        plain.step("float64", **exact),
        rung.layout,
        checkpoint=False,
    )
    if case.diagnosis is not None:
        named = dataclasses.replace(case.diagnosis, axis=f"{rung.name} (the rungs below agree)")
        case = dataclasses.replace(case, diagnosis=named)
    if not case.passed:
        return RungResult(rung, case)
    spec = rung.step(precision, **fields)
    try:
        measured = runner.pool.run(rung.layout.world, gauge, spec, rung.layout, TIMED)
    except WorkerError as error:  # out of memory, for example
        failed = dataclasses.replace(case, error=describe_tracebacks(str(error)))
        return RungResult(rung, failed)
    slowest = [max(seconds) for seconds in zip(*(s for _, s in measured), strict=True)]
    peaks = tuple(peak for peak, _ in measured)
    return RungResult(rung, case, peaks, statistics.median(slowest))
