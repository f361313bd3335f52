"""The main job: train a hybrid model, stop, resume its checkpoint in another layout."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nemo_megacpp.data.builtin import ensure_builtin
from nemo_megacpp.errors import UserError
from nemo_megacpp.nemo.train import train_recipe
from nemo_megacpp.recipes.recipe import Recipe, from_mapping
from nemo_megacpp.runs.curves import Curve, draw_phases, read_curve

MAX_STEPS = 120
CHECKPOINT_AT = 80
OVERLAP = 5
"""Steps that both layouts run after the checkpoint, to be compared."""
TOLERANCE = 1e-5
"""Relative difference of two float32 losses that only rounding may explain."""
FALL_TO = 0.7
"""Held-out loss must fall to this share of ln(vocabulary), the loss of a uniform guess."""

_COMMON = {"recipe": "nam56r_tiny", "max_steps": MAX_STEPS, "save_interval": CHECKPOINT_AT}


def _phase_one(out: Path) -> Recipe:
    stop = {"stop_after": CHECKPOINT_AT + OVERLAP, "run_dir": str(out / "phase1-tp2")}
    return from_mapping({**_COMMON, **stop, "tensor_parallel": 2, "expert_tensor_parallel": 1})


def _phase_two(out: Path) -> Recipe:
    checkpoint = out / "phase1-tp2" / "checkpoints" / f"step={CHECKPOINT_AT}"
    return from_mapping(
        {
            **_COMMON,
            "run_dir": str(out / "phase2-pp2"),
            "resume": str(checkpoint),
            "tensor_parallel": 1,
            "pipeline_parallel": 2,
        }
    )


def demo(out: str | Path) -> int:
    """Run both phases under ``out`` and show what they prove.

    Returns:
        0, or 1 if a layout changed the numbers or the held-out loss did not fall.
    """
    out, console = Path(out), Console()
    started = time.perf_counter()
    _clear(out)
    one = _phase_one(out)
    vocab_size = one.model["vocab_size"]
    console.rule("data: torch's C++ headers, byte-level BPE, Megatron .bin/.idx")
    data = ensure_builtin(vocab_size)
    for split, counts in data.splits.items():
        console.print(f"{split}: {counts.documents:,} documents, {counts.tokens:,} tokens")
    trained = time.perf_counter()
    console.rule(f"phase one: {one.layout.describe()}")
    first = read_curve(train_recipe(one))
    two = _phase_two(out)
    console.rule(f"phase two: {two.layout.describe()}, from the checkpoint of phase one")
    second = read_curve(train_recipe(two))
    trained = time.perf_counter() - trained

    console.rule("the same weights, the same data, two layouts")
    worst = _compare(console, first, second)
    picture = out / "loss.png"
    draw_phases([("TP=2, SP", first), ("PP=2", second)], CHECKPOINT_AT, picture)
    uniform = math.log(vocab_size)
    last = second.heldout[max(second.heldout)]
    fell = last < FALL_TO * uniform
    console.print(
        f"first resumed step: losses differ by {worst:.1e} relative (allowed {TOLERANCE:.0e})\n"
        f"held-out loss: from ln({vocab_size}) = {uniform:.2f} to {last:.2f}, "
        f"{last / uniform:.0%} of it (asked: below {FALL_TO:.0%})\n"
        f"{_speed(first, second)}\n"
        f"training took {trained:.0f} s, all of it {time.perf_counter() - started:.0f} s"
    )
    _next_commands(console, out, picture)
    if worst > TOLERANCE:
        console.print("[red]FAILED: the layout changed the loss[/red]")
    if not fell:
        console.print("[red]FAILED: the held-out loss did not fall far enough[/red]")
    return 0 if fell and worst <= TOLERANCE else 1


def _clear(out: Path) -> None:
    """Remove an earlier demo; refuse a folder that is anything else."""
    mark = out / ".nemo-megacpp-demo"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder. Choose another --out.")
    if out.exists() and any(out.iterdir()) and not mark.exists():
        raise UserError(f"{out} is not empty and not an earlier demo. Choose another --out.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    mark.touch()


def _compare(console: Console, first: Curve, second: Curve) -> float:
    """Print the losses of the steps that both layouts ran; return the first step's difference."""
    table = Table("step", "loss at TP=2, SP", "loss at PP=2", "relative difference")
    differences = []
    for step in range(CHECKPOINT_AT + 1, CHECKPOINT_AT + OVERLAP + 1):
        a, b = first.losses[step], second.losses[step]
        differences.append(abs(a - b) / abs(a))
        table.add_row(str(step), f"{a:.7f}", f"{b:.7f}", f"{differences[-1]:.1e}")
    console.print(table)
    return differences[0]


def _speed(*curves: Curve) -> str:
    rates = sorted(r["tokens_per_second"] for curve in curves for r in curve.steps.values())
    return f"median speed {rates[len(rates) // 2]:,.0f} tokens/s on two CPU ranks"


def _next_commands(console: Console, out: Path, picture: Path) -> None:
    console.print(
        f"\nloss curve: {picture}\n"
        f"TensorBoard: .venv/bin/tensorboard --logdir {out}\n"
        "try next:\n"
        "  .venv/bin/nemo-megacpp recipes\n"
        "  .venv/bin/nemo-megacpp train nam56r_tiny pattern=AEMR pipeline_parallel=2 max_steps=20\n"
        "  .venv/bin/nemo llm pretrain --factory nam56r_tiny --yes\n"
        "  .venv/bin/nemo-megacpp data prepare YOUR_CODE --out data/mine --vocab-size 4096\n"
        "  .venv/bin/nemo-megacpp train nam56r_tiny data=data/mine",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
