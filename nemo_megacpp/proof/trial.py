"""What was tried and what came of it: the data that `verify` gives to people and programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_megacpp.proof.compare import Rung, RungName
from nemo_megacpp.proof.kernels import KernelsName
from nemo_megacpp.proof.step_spec import Dtype

DifferenceKind = Literal["output", "output gradient", "parameter gradient"]


@dataclass(frozen=True)
class Difference:
    """A tensor inside the model that a layout changes.

    Attributes:
        kind: what differs: what a module computes, the gradient of that, or a parameter's gradient.
        module: the module that it belongs to, named as in a checkpoint. ``:core`` is what its
            output projection is given, ``:scan`` what a mixer's norm is given, ``:shared`` the part
            of a projection that all tensor-parallel ranks compute.
        layer: global number of the module's layer, from 1; None outside layers.
        family: letter of the layer, or None.
        difference, tolerance: relative to the largest element; between replicas if that is more.
        rounding: how far rounding was seen to move it (bf16), else None.
        expected, found: the numbers on one rank and in the layout where they differ most; None
            where there is nothing to compare.
    """

    kind: DifferenceKind
    module: str
    layer: int | None
    family: str | None
    difference: float
    tolerance: float
    rounding: float | None
    expected: float | None
    found: float | None


@dataclass(frozen=True)
class Finding:
    """Where a trial that failed began to differ.

    Attributes:
        rung: the first rung that does not hold.
        parameter: the parameter with a wrong tag, else the one farthest beyond its tolerance, by
            its gradient, else after the step; empty if every parameter agrees.
        first: the first tensor that differs. Outputs are looked at in the order of the forward
            pass, then their gradients in the order of the backward pass; where all of these agree,
            a parameter's gradient is summed wrongly. None if nothing inside the model differs.
        axis: the axis, or the axes together, that make it differ.
    """

    rung: RungName
    parameter: str
    first: Difference | None
    axis: str = ""


@dataclass(frozen=True)
class Trial:
    """One model in one layout, against the same weights on one rank.

    Attributes:
        model: ``all``, or the letter of a family.
        axis: what the layout moves, or ``together``.
        layout: as text.
        dtype: of the parameters; float64 goes through a linear form of the logits, float32 and
            bfloat16 through the loss.
        rungs: what was compared; empty if the layout could not be run.
        error: why it could not, or None.
        finding: where it began to differ, if a rung does not hold.
        kernels: what it ran in (:class:`nemo_megacpp.proof.kernels.Kernels`).
    """

    model: str
    axis: str
    layout: str
    dtype: Dtype
    rungs: tuple[Rung, ...] = ()
    error: str | None = None
    finding: Finding | None = None
    kernels: KernelsName = "torch"

    @property
    def holds(self) -> bool:
        """Whether every rung is within its tolerance."""
        return self.error is None and all(rung.holds for rung in self.rungs)
