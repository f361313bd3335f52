"""Run every benchmark script, one process each, and show one table.

    python -m benchmarks                       # make bench
    python -m benchmarks --device cuda         # make bench-gpu, on the Python that is there
    python -m benchmarks --only ssd,stack --quick

Writes ``build/bench-DEVICE.json``: the rows of all scripts with machine, versions and commit. Exit
status 1 if a script fails; a missed aim is shown as missed. Needs torch, Triton, Megatron-Core and
this package's own light dependencies, and neither NeMo nor a network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = ("startup", "stack", "tp_step", "ssd", "mamba3", "m2rnn", "recompute", "cp_attention")
"""In the order in which they run, one per claim."""
REQUIRED = {
    "torch": "torch",
    "triton": "triton",  # which Megatron's Mamba mixer imports, on a CPU too
    "megatron.core": "megatron-core",
    "numpy": "numpy",
    "einops": "einops",
    "rich": "rich",
    "filelock": "filelock",
    "psutil": "psutil",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "setuptools": "setuptools",  # which torch's benchmark module imports
}
PEERS = {
    "transformers": "Hugging Face's mixers, beside SSD",
    "fla": "flash-linear-attention's forms",
    "mamba_ssm": "Mamba's CUDA kernels, and Megatron's MambaMixer on a GPU",
    "causal_conv1d": "the fused convolution",
    "transformer_engine": "Megatron's Transformer Engine modules",
}
SHOWN_OF_A_FAILURE = 30


def missing(names: dict[str, str]) -> list[str]:
    """Return the modules of ``names`` that cannot be found; imports their parent packages only."""
    found = []
    for name in names:
        with contextlib.suppress(ImportError):
            if importlib.util.find_spec(name) is not None:
                continue
        found.append(name)
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python and of the distributions that decide the figures."""
    found = {"python": platform.python_version()}
    names = ("torch", "triton", "megatron-core", "transformers", "flash-linear-attention")
    for name in (*names, "fla-core", "mamba-ssm", "transformer-engine"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """Return the commit of this checkout, with ``-dirty`` if files differ from it."""
    git = ("git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*")
    with contextlib.suppress(OSError):
        done = subprocess.run(git, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"


def run_script(name: str, arguments: argparse.Namespace, folder: Path, limit: float) -> dict:
    """Run one script for at most ``limit`` seconds; return what it wrote, its seconds and, if it
    failed, why."""
    result, log = folder / f"{name}.json", folder / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", "--device", arguments.device]
    command += ["--threads", str(arguments.threads), "--json", str(result)]
    if arguments.repeats:
        command += ["--repeats", str(arguments.repeats)]
    if arguments.quick:
        command.append("--quick")
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", ""), str(arguments.peers or "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(arguments.threads),
    }
    before, problem = time.monotonic(), ""
    with log.open("w") as stream:
        try:
            status = subprocess.run(
                command,
                env=environment,
                stdout=stream,
                stderr=stream,
                timeout=max(limit, 1),
                check=False,
            ).returncode
            problem = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
    if not problem and not result.exists():
        problem = "wrote no result"
    entry = {"script": name, "seconds": time.monotonic() - before, "problem": problem}
    if problem:
        print(f"  {problem}; the end of {log}:")
        print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_OF_A_FAILURE:]))
        return entry
    return entry | json.loads(result.read_text())


def main() -> int:
    """Run the scripts; return 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default=",".join(SCRIPTS), help="names of scripts, with commas")
    parser.add_argument(
        "--repeats", type=int, default=0, help="instead of each script's own number"
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch, on a CPU")
    parser.add_argument(
        "--quick", action="store_true", help="the smallest sizes, to try the scripts"
    )
    parser.add_argument("--limit", type=int, default=240, help="seconds for one script")
    parser.add_argument("--total", type=int, default=900, help="seconds for all of them")
    parser.add_argument("--peers", type=Path, help="a folder of peers' packages to import from")
    parser.add_argument("--out", type=Path, default=HERE.parent / "build")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - set(SCRIPTS):
        parser.error(f"no script {', '.join(sorted(unknown))}; there are {', '.join(SCRIPTS)}")
    if absent := missing(REQUIRED):
        packages = " ".join(REQUIRED[name] for name in absent)
        print(
            f"{sys.executable} cannot import {', '.join(absent)}. Install what is missing, without "
            f"a network from a folder of wheels:\n"
            f"  {sys.executable} -m pip install --no-index --find-links DIR {packages}"
        )
        return 1
    sys.path += [str(HERE.parent), *([str(arguments.peers)] if arguments.peers else [])]
    from benchmarks.harness import machine, rows_table
    from nemo_megacpp.render import make_console, print_table

    info = machine(arguments.device) | {"commit": commit(), "versions": versions()}
    info |= {"load": os.getloadavg()[0], "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    print(f"{info['device']}, {info['versions']}, commit {info['commit']}, load {info['load']:.1f}")
    skipped = [
        (why, f"{name} is not installed") for name, why in PEERS.items() if missing({name: ""})
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which also ends the running script
    folder = arguments.out / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    entries, began = [], time.monotonic()
    for index, name in enumerate(names, 1):
        print(f"[{index} of {len(names)}] {name} …", flush=True)
        left = arguments.total - (time.monotonic() - began)
        entries.append(run_script(name, arguments, folder, min(arguments.limit, left)))
        print(f"  {entries[-1]['seconds']:.0f} s", flush=True)
    rows = [row for entry in entries for row in entry.get("rows", ())]
    print_table(make_console(160), rows_table(rows))
    skipped += [tuple(item) for entry in entries for item in entry.get("skipped", ())]
    for what, why in skipped:
        print(f"Did not run: {what}: {why}")
    failed = [entry["script"] for entry in entries if entry["problem"]]
    missed = sum(row["met"] is False for row in rows)
    met = sum(row["met"] is True for row in rows)
    print(
        f"{met} aims met, {missed} missed; {len(failed)} scripts failed {' '.join(failed)}".rstrip()
    )
    path = arguments.out / f"bench-{arguments.device}.json"
    result = {"machine": info, "scripts": entries, "skipped": skipped}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote {path}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
