"""``nemo-megacpp demo``: train a hybrid model, stop, resume it in another layout, compare."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nemo_megacpp.data.builtin import ensure_builtin
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.recipe import from_mapping
from nemo_megacpp.runs.curves import Curve, draw_phases, read_curve
from nemo_megacpp.runs.run_lock import validate_not_running
from nemo_megacpp.start import train_recipe

MAX_STEPS = 120
CHECKPOINT_AT = 80
OVERLAP = 5
"""Steps that both layouts run after the checkpoint, to be compared."""
TOLERANCE = 1e-5
"""Largest relative difference of two float32 losses that rounding explains."""
LINES = ("#include <", "for (int64_t i = 0; i <", "template <typename T>")
"""What the model completes at the end."""
FALL_TO = 0.7
"""Held-out loss must fall to this share of ln(vocabulary), the loss of a uniform guess."""


def demo(out: str | Path) -> int:
    """Run both phases under ``out`` and compare them.

    Returns:
        0, or 1 if a layout changed the numbers or the held-out loss did not fall.
    """
    out, console = Path(out), Console()
    started = time.perf_counter()
    _clear(out)
    common = {"recipe": "nam56r_tiny", "max_steps": MAX_STEPS, "save_interval": CHECKPOINT_AT}
    stop = {"stop_after": CHECKPOINT_AT + OVERLAP, "run_dir": str(out / "phase1-tp2")}
    one = from_mapping({**common, **stop, "tp": 2, "etp": 1})
    vocab_size = one.model["vocab_size"]
    console.rule("data: torch's C++ headers, byte-level BPE, Megatron .bin/.idx")
    data = ensure_builtin(vocab_size)
    for split, counts in data.splits.items():
        console.print(f"{split}: {counts.documents:,} documents, {counts.tokens:,} tokens")
    trained = time.perf_counter()
    console.rule(f"phase one: {one.layout.describe()}")
    first = read_curve(train_recipe(one))
    checkpoint = out / "phase1-tp2" / "checkpoints" / f"step={CHECKPOINT_AT}"
    resume = {"resume": str(checkpoint), "run_dir": str(out / "phase2-pp2")}
    two = from_mapping({**common, **resume, "tp": 1, "pp": 2})
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
    rates = [r["tokens_per_second"] for curve in (first, second) for r in curve.steps.values()]
    console.print(
        f"first resumed step: losses differ by {worst:.1e} relative (allowed {TOLERANCE:.0e})\n"
        f"held-out loss: from ln({vocab_size}) = {uniform:.2f} to {last:.2f}, "
        f"{last / uniform:.0%} of it (required: below {FALL_TO:.0%})\n"
        f"median speed {statistics.median(rates):,.0f} tokens/s on two CPU ranks\n"
        f"training took {trained:.0f} s, the whole demo {time.perf_counter() - started:.0f} s"
    )
    _complete(console, out / "phase2-pp2")
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
    for phase in ("phase1-tp2", "phase2-pp2"):
        validate_not_running(out / phase)
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


def _complete(console: Console, run: Path) -> None:
    """Have the model complete three lines of C++."""
    # Here, as the phases before need neither torch nor Megatron in this process.
    from nemo_megacpp.checkpoint.content import CheckpointContent
    from nemo_megacpp.inference.ranks import generate
    from nemo_megacpp.inference.request import make_request
    from nemo_megacpp.inference.sampling import GREEDY
    from nemo_megacpp.inference.transcript import Transcript

    console.rule("what it has learned: three lines of C++ and what the model adds")
    content = CheckpointContent(run)
    request = make_request(content, LINES, GREEDY, max_new_tokens=24)
    generate(request, Transcript(LINES))


def _next_commands(console: Console, out: Path, picture: Path) -> None:
    console.print(
        f"\nloss curve: {picture}\n"
        f"TensorBoard: .venv/bin/tensorboard --logdir {out}\n"
        "try next:\n"
        f"  .venv/bin/nemo-megacpp generate {out / 'phase2-pp2'} --prompt 'namespace '\n"
        "  .venv/bin/nemo-megacpp recipes\n"
        "  .venv/bin/nemo-megacpp train nam56r_tiny pattern=AEMR pipeline_parallel=2 max_steps=20\n"
        "  .venv/bin/nemo llm pretrain --factory nam56r_tiny --yes\n"
        "  .venv/bin/nemo-megacpp data prepare YOUR_CODE --out data/mine --vocab-size 4096\n"
        "  .venv/bin/nemo-megacpp train nam56r_tiny data=data/mine",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
