"""Save, load and verify a checkpoint, beside a plain copy of the same bytes on the same disk.

    python benchmarks/checkpoint_io.py --mib 1024 --folder /where/checkpoints/go

One rank; every figure is the best of ``--repeat`` runs, in MB/s (1e6 bytes). Reads find the file in
the page cache, if it fits: they time the work, not the disk. Copy and save include the flush.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from nemo_megacpp.checkpoint.guard import guard_load
from nemo_megacpp.checkpoint.manifest import check_manifest, is_complete, write_manifest
from nemo_megacpp.runtime.workers import WorkerPool

_TENSOR_MIB = 32


def _state(mib: int) -> dict[str, ShardedTensor]:
    numbers = torch.arange(_TENSOR_MIB << 18, dtype=torch.float32)
    return {
        f"tensor.{index}": ShardedTensor.from_rank_offsets(f"tensor.{index}", numbers + index)
        for index in range(max(1, mib // _TENSOR_MIB))
    }


def _save(folder: Path, mib: int) -> float:
    state = _state(mib)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    began = time.perf_counter()
    dist_checkpointing.save(state, str(folder))
    return time.perf_counter() - began


def _load(folder: Path, mib: int) -> float:
    state = _state(mib)
    began = time.perf_counter()
    guard_load(folder, verify=False)
    dist_checkpointing.load(state, str(folder))
    return time.perf_counter() - began


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _read(folder: Path) -> None:
    buffer = memoryview(bytearray(4 << 20))
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def _copy(folder: Path) -> None:
    out = folder.with_name("copy")
    shutil.copytree(folder, out)
    for path in (*out.iterdir(), out):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size (default %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each (default %(default)s)")
    parser.add_argument("--folder", type=Path, help="disk to use (default: the temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as place, WorkerPool(1, threads=2) as ranks:
        folder = Path(place) / "weights"
        runs: dict[str, Callable[[], float]] = {
            "save (Megatron)": lambda: ranks.run(1, _save, folder, args.mib)[0],
            "plain copy, flushed": lambda: _timed(lambda: _copy(folder)),
            "write manifest": lambda: _timed(lambda: write_manifest(folder)),
            "plain read": lambda: _timed(lambda: _read(folder)),
            "verify every byte": lambda: _timed(lambda: check_manifest(folder)),
            "load (Megatron)": lambda: ranks.run(1, _load, folder, args.mib)[0],
            "names and sizes only": lambda: _timed(lambda: is_complete(folder)),
        }
        for name, run in runs.items():
            seconds = min(run() for _ in range(args.repeat))
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"{name:<22} {seconds:8.3f} s  {size / seconds / 1e6:10,.0f} MB/s", flush=True)


if __name__ == "__main__":
    main()
