"""What every benchmark script shares: paired times, peak memory, this machine's matmul peak, and
one table and one JSON file of the comparisons.

A script is a process of its own with the flags of :func:`common_arguments`::

    def main() -> int:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        common_arguments(parser)
        arguments = parser.parse_args()
        device = start(arguments)
        peak = matmul_peak(device, torch.float32)
        ours, peer = paired(ours_step, peer_step, repeats=arguments.repeats, device=device)
        row = Row("scan, forward and backward", ours, peer, "eager loop", "l=512 n=8 float32")
        return finish(arguments, [row], skipped=[("Triton kernel", "needs a CUDA device")])

A missed aim is a result and is shown; a script fails (exit status 1) only when it breaks. A
comparison whose forms disagree in their numbers must raise instead of returning a row.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer

from nemo_megacpp.render import Table, Toned, make_console, print_table, show_bytes

Work = Callable[[], object]
PYTHON = "Python and autograd"
SHOWN_OPERATIONS = 9
SHORTEST = 0.02
"""Seconds. Faster work is repeated within one measurement until it takes as long as this."""


@dataclass
class Sample:
    """Measurements of one form.

    Attributes:
        values: one per repeat, in ``unit``.
        unit: ``"s"``, ``"B"`` or ``""`` for a plain number such as an exponent.
    """

    values: list[float]
    unit: str = "s"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the greatest value."""
        return min(self.values), max(self.values)

    def show(self) -> str:
        """Return the median, and the range in the same unit where there is more than one value."""
        if self.unit == "B":
            return show_bytes(self.median)
        power, unit = 1.0, ""
        if self.unit == "s":
            powers = ((1.0, " s"), (1e3, " ms"), (1e6, " µs"))
            power, unit = next((p for p in powers if self.median * p[0] >= 1), powers[-1])
        low, middle, high = (
            _digits(value * power) for value in (self.spread[0], self.median, self.spread[1])
        )
        return f"{middle}{unit}" + (f" ({low}..{high})" if len(self.values) > 1 else "")


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


@dataclass
class Row:
    """One comparison.

    Attributes:
        claim: what is compared, such as ``"ssd, forward and backward, middle size"``.
        ours: our measurements; ``peer``: the peer's, taken in turn with ours, or None.
        peer_name: the peer with its version, such as ``"transformers 4.57.6, Mamba2Mixer"``.
        sizes: shapes, dtype.
        operations: floating-point operations of one run of ours, for its share of ``peak``.
        peak: flop/s of :func:`matmul_peak` in the same dtype.
        aim: the aim in words, such as ``"at least 2x"``; empty for a figure without an aim.
        aim_ratio: met if ``ratio`` is at least this; 1/1.02 states "at most 1.02 times the peer".
        aim_share: met if ``share`` is at least this.
        aim_at_most: met if our median is at most this, in our unit.
        profile: of a missed aim, what :func:`explain` found.
    """

    claim: str
    ours: Sample
    peer: Sample | None = None
    peer_name: str = ""
    sizes: str = ""
    operations: float | None = None
    aim: str = ""
    aim_ratio: float | None = None
    peak: float | None = None
    aim_share: float | None = None
    aim_at_most: float | None = None
    profile: list[dict] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """How many times the peer's time or memory is ours: the median over the pairs."""
        if self.peer is None:
            return None
        if len(self.peer.values) != len(self.ours.values):
            return self.peer.median / self.ours.median
        pairs = zip(self.ours.values, self.peer.values, strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)

    @property
    def share(self) -> float | None:
        """The share of the matmul peak."""
        if self.operations is None or self.peak is None:
            return None
        return self.operations / self.ours.median / self.peak

    @property
    def met(self) -> bool | None:
        """Whether every aim is met; None without an aim."""
        aims: list[bool] = []
        if self.aim_ratio is not None:
            assert self.ratio is not None, f"{self.claim}: an aim against no peer"
            aims.append(self.ratio >= self.aim_ratio)
        if self.aim_share is not None:
            assert self.share is not None, f"{self.claim}: operations and peak are missing"
            aims.append(self.share >= self.aim_share)
        if self.aim_at_most is not None:
            aims.append(self.ours.median <= self.aim_at_most)
        return all(aims) if aims else None


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every script takes."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu or cuda; here: {default}")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each form")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, to try a script")


def start(arguments: argparse.Namespace) -> torch.device:
    """Return the device, with torch's threads and seed set."""
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device {arguments.device}: torch {torch.__version__} finds no CUDA device.")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return device


def paired(
    ours: Work, peer: Work | None, *, repeats: int, device: torch.device | str
) -> tuple[Sample, Sample | None]:
    """Return the seconds of one run of each form, measured in turn: A B A B.

    Each form runs twice before, to warm up and to choose how often it is repeated within one
    measurement. The clock waits for a GPU.
    """
    works = [ours] if peer is None else [ours, peer]
    numbers = []
    for work in works:
        _seconds(work, 1)
        numbers.append(max(1, round(SHORTEST / max(_seconds(work, 1), 1e-6))))
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for values, work, number in zip(times, works, numbers, strict=True):
            values.append(_seconds(work, number) / number)
    return Sample(times[0]), Sample(times[1]) if peer is not None else None


def _seconds(work: Work, number: int) -> float:
    before = timer()  # synchronizes with a GPU
    for _ in range(number):
        work()
    return timer() - before


def peak_bytes(work: Work, device: torch.device | str) -> int:
    """Return the most memory that one run of ``work`` had in use, in bytes above the start.

    Of torch's allocator on a GPU. On a CPU: the running sum of the allocations and frees that
    torch's profiler records, so the slack of the C library's allocator does not count. ``work`` is
    called once before, for what is allocated once.
    """
    work()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "torch's profiler recorded no allocation"
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak


def explain(
    row: Row, work: Work, device: torch.device | str, per: tuple[str, int] = ("run", 1)
) -> Row:
    """Put into ``row``, if its aim is missed, what one run of our ``work`` spends its time on.

    ``row.profile`` then holds, for the kinds of operations that take the most time and for all
    others together, their name, number and seconds per ``per`` (what, how many are in a run), as
    torch's profiler has them: of a GPU its kernels' time. What is spent outside of operations
    counts as Python. The profiler itself adds about a microsecond to an operation.
    """
    if row.met is not False:
        return row
    gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]
    repeats = max(1, round(SHORTEST / row.ours.median))
    with profile(activities=activities) as profiled:
        for _ in range(repeats):
            work()
    found: dict[str, tuple[int, float]] = {}
    for event in profiled.key_averages():
        name = event.key.removeprefix("aten::") if gpu or "aten::" in event.key else PYTHON
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        calls, seconds = found.get(name, (0, 0.0))
        found[name] = calls + event.count, seconds + spent / 1e6
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    rest = [numbers for _, numbers in ordered[SHOWN_OPERATIONS:]]
    if rest:
        calls, seconds = (sum(column) for column in zip(*rest, strict=True))
        ordered[SHOWN_OPERATIONS:] = [(f"{len(rest)} others", (int(calls), seconds))]
    what, number = per[0], per[1] * repeats
    row.profile = [
        {"operation": name, "calls": calls / number, "seconds": seconds / number, "per": what}
        for name, (calls, seconds) in ordered
    ]
    return row


def matmul_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """Return the flop/s of the fastest of several square matrix products."""
    device = torch.device(device)
    best = 0.0
    for size in (2048, 8192) if device.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        sample, _ = paired(lambda: torch.mm(a, b, out=out), None, repeats=5, device=device)  # noqa: B023
        best = max(best, 2 * size**3 / min(sample.values))
    return best


def machine(device: torch.device | str = "cpu") -> dict[str, object]:
    """Return what a reader needs to know of the machine."""
    found: dict[str, object] = {
        "kind": torch.device(device).type,
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.device(device).type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    """Return the model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def rows_table(records: Sequence[dict], title: str = "") -> Table:
    """Return the table of rows as :func:`record` writes them."""
    columns = ["<claim", "ours", "peer", "ratio", "of peak", "<aim", "<met", "<sizes", "<peer is"]
    table = Table(columns, title=title)
    for row in records:
        ours, peer = Sample(**row["ours"]), row["peer"] and Sample(**row["peer"])
        table.add(
            row["claim"],
            ours.show(),
            peer.show() if peer else "-",
            f"{row['ratio']:.3g}x" if row["ratio"] is not None else "-",
            f"{row['share']:.1%}" if row["share"] is not None else "-",
            row["aim"] or "-",
            {True: Toned("met", "good"), False: Toned("missed", "bad"), None: "-"}[row["met"]],
            row["sizes"],
            row["peer_name"] or "-",
        )
    return table


def profile_table(record: dict) -> Table:
    """Return the table of a record's ``profile``."""
    per = record["profile"][0]["per"]
    columns = ["<operation", f"calls a {per}", "each", f"a {per}", "of the time"]
    table = Table(columns, title=record["claim"])
    total = sum(entry["seconds"] for entry in record["profile"])
    for entry in record["profile"]:
        calls, seconds = entry["calls"], entry["seconds"]
        times = (Sample([value]).show() for value in (seconds / calls, seconds))
        table.add(entry["operation"], _digits(calls), *times, f"{seconds / total:.0%}")
    return table


def record(row: Row) -> dict:
    """Return a row as JSON, with what is computed from it."""
    return asdict(row) | {"ratio": row.ratio, "share": row.share, "met": row.met}


def finish(
    arguments: argparse.Namespace, rows: Sequence[Row], skipped: Sequence[tuple[str, str]] = ()
) -> int:
    """Print the table and what did not run (what, why), write the JSON; return exit status 0."""
    records = [record(row) for row in rows]
    console = make_console(160)
    print_table(console, rows_table(records))
    for found in records:
        if found["profile"]:
            print_table(console, profile_table(found))
    for what, why in skipped:
        print(f"Did not run: {what}: {why}")
    if arguments.json:
        result = {"machine": machine(arguments.device), "rows": records, "skipped": list(skipped)}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0
