"""An estimated step as a bar of letters, a table, a line and plain data."""

from __future__ import annotations

from typing import Any

from nemo_megacpp.contract.machine import Arithmetic, Machine
from nemo_megacpp.contract.step_time import (
    AGAIN,
    BUBBLE,
    CHANNELS,
    ENDS,
    GATHERED,
    OPTIMIZER,
    REDUCED,
    StepTime,
)
from nemo_megacpp.families import block_of
from nemo_megacpp.pattern import Family
from nemo_megacpp.render import Table

_LETTERS = {
    ENDS: "h",
    CHANNELS: "s",
    AGAIN: "x",
    "tp": "t",
    "cp": "c",
    "ep": "e",
    "pp": "p",
    REDUCED: "g",
    GATHERED: "w",
    OPTIMIZER: "o",
    BUBBLE: ".",
}
_WORDS = {
    ENDS: "embedding, head and loss",
    CHANNELS: "side channels",
    AGAIN: "recomputation",
    REDUCED: "gradients summed",
    GATHERED: "weights gathered",
    OPTIMIZER: "optimizer",
    BUBBLE: "pipeline bubble",
}
_TABLE_BAR = 50


def ordered(step: StepTime) -> dict[str, float]:
    """Return the parts: families, ends, recomputation, collectives, optimizer, bubble."""
    families = sorted(name for name in step.parts if len(name) == 1)
    names = [*families, *(name for name in _LETTERS if name in step.parts)]
    return {name: step.parts[name] for name in names}


def bar(step: StepTime, longest: float, width: int) -> str:
    """Return a letter for each ``width``-th part of ``longest`` seconds.

    Every letter stands where the parts before it end, so that rounding moves none by more than one.
    """
    text, end = "", 0.0
    for name, seconds in ordered(step).items():
        end += seconds
        text += _LETTERS.get(name, name) * (round(end / longest * width) - len(text))
    return text


def legend(steps: list[StepTime]) -> str:
    """Return what the letters of the steps' bars mean, without the families'."""
    present = {name for step in steps for name in step.parts}
    axes = [name for name in ("tp", "cp", "ep", "pp") if name in present]
    words = [f"{_LETTERS[name]} {text}" for name, text in _WORDS.items() if name in present]
    if axes:
        letters = " ".join(_LETTERS[name] for name in axes)
        words.insert(0, f"{letters} collectives of {', '.join(map(str.upper, axes))}")
    return "A M E R F and other capitals: computation of the families; " + "; ".join(words)


def step_line(step: StepTime, machine: Machine, arithmetic: Arithmetic) -> str:
    """Return the estimate in one line."""
    return (
        f"{show_step(step.seconds)} on {machine.name}: {step.tokens_per_gpu:,.0f} tokens/s a GPU, "
        f"{step.flops_per_gpu / 1e12:,.0f} TFLOP/s a GPU, {step.utilization:.1%} of the peak of "
        f"{machine.peak(arithmetic) / 1e12:,.0f}"
    )


def parts_table(step: StepTime, machine: Machine, arithmetic: Arithmetic) -> Table:
    """Return the parts of the estimate, on a rank of the slowest stage."""
    table = Table(
        ("<part", "time", "share", "<"), f"Estimated step: {step_line(step, machine, arithmetic)}"
    )
    for name, seconds in ordered(step).items():
        share = seconds / step.seconds
        letter = _LETTERS.get(name, name)
        table.add(
            _name(name), show_step(seconds), f"{share:.1%}", letter * round(share * _TABLE_BAR)
        )
    table.total = ("all", show_step(step.seconds), "100.0%", "")
    return table


def assumptions(machine: Machine) -> str:
    """Return what of the estimate is assumed, in one line."""
    share = machine.efficiency
    return (
        f"assumed: sustained shares of the peaks (matmul {share.matmul:.0%}, of experts "
        f"{share.grouped_matmul:.0%}, attention {share.attention:.0%}, scans {share.scan:.0%}, "
        f"memory {share.memory:.0%}, links {share.link:.0%}), "
        f"{machine.recurrent_token_seconds * 1e6:g} us a token of R, "
        f"{machine.kernel_seconds * 1e6:g} us a kernel, balanced routing, collectives of layers "
        f"not overlapped; no step was measured"
    )


def step_document(step: StepTime) -> dict[str, Any]:
    """Return the estimate as plain data."""
    return {
        "seconds": step.seconds,
        "parts": ordered(step),
        "slowest_stage": step.slowest_stage,
        "tokens_per_second_per_gpu": step.tokens_per_gpu,
        "model_flops_per_second_per_gpu": step.flops_per_gpu,
        "model_flops_utilization": step.utilization,
    }


def show_step(seconds: float) -> str:
    """Return ``1.23 s`` or ``45.6 ms``."""
    if seconds >= 1:
        return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"
    return f"{seconds * 1e3:.1f} ms"


def _name(part: str) -> str:
    if len(part) == 1:
        return f"{part} {block_of(Family(part)).name}".strip()
    return _WORDS.get(part, f"collectives of {part.upper()}")
