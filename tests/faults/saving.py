"""What the ranks run: a small model saved as a run saves it, and ``kill -9`` in the midst of it.

Two ranks at PP=2: every tensor lives on one of them, so that what it holds can be a function of
the step and the rank.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import dist_checkpointing

from nemo_megacpp.checkpoint.dcp import model_sharded_state_dict
from nemo_megacpp.checkpoint.lifecycle import (
    begin_checkpoint,
    clear_leftovers,
    finish_checkpoint,
    prune,
)
from nemo_megacpp.checkpoint.weights import load_weights
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.orphans import bind_helpers
from tests.bare import build_chunks, make_config

RANKS = 2
KEEP_LAST = 2

_LAYOUT = ParallelLayout.parse("pp=2")
_SPEC = StepSpec(tiny_model("AEMR", vocab_size=16384), dtype="float32")
_IDENTITY = {"model": {}, "layout": "pp=2", "tokenizer": "0" * 64}

Chunks = list[torch.nn.Module]


@dataclass(frozen=True)
class Kill:
    """Who is killed, and when.

    Attributes:
        victims: one rank, or all of them at once.
        rank: of the one; of the one that kills all.
        seconds: after the save has begun; None: at an event.
        event: the how many-th file that ``rank`` opens, renames, makes or removes in the folder.
    """

    victims: Literal["one", "all"]
    rank: int
    seconds: float | None = None
    event: int | None = None


def checkpoint_of(folder: str | Path, step: int) -> Path:
    """Return where a step is saved."""
    return Path(folder) / f"step={step}"


def save_whole(folder: str, step: int) -> tuple[float, int]:
    """Save ``step`` undisturbed; return the seconds it took and the file events of this rank."""
    chunks = _filled(step)
    events = [0]
    _on_file_event(folder, lambda: events.__setitem__(0, events[0] + 1))
    torch.distributed.barrier()
    started = time.perf_counter()
    _save(chunks, folder, step)
    return time.perf_counter() - started, events[0]


def save_and_be_killed(folder: str, step: int, kill: Kill) -> None:
    """Save ``step`` and be killed by ``kill``; returns if the save was over before."""
    chunks = _filled(step)
    processes: list[Any] = [None] * RANKS
    torch.distributed.all_gather_object(processes, os.getpid())
    torch.distributed.barrier()
    if kill.rank == torch.distributed.get_rank():
        own = os.getpid()
        others = [process for process in processes if process != own]
        _arrange(kill, folder, [*(others if kill.victims == "all" else ()), own])
    _save(chunks, folder, step)


def load_then_save(folder: str, step: int, following: int) -> list[str]:
    """Load ``step``, then save ``following`` into the same folder, as a resumed run does.

    Returns:
        Names of the tensors of this rank that are not, bit for bit, what was saved at ``step``.
    """
    chunks = _filled(following)
    wanted = _digests(_refilled(chunks, step))
    load_weights(_refilled(chunks, following), checkpoint_of(folder, step) / "weights")
    found = _digests(chunks)
    if torch.distributed.get_rank() == 0:
        clear_leftovers(Path(folder))
    _save(_refilled(chunks, following), folder, following)
    return [name for name in wanted if found[name] != wanted[name]]


def _filled(step: int) -> Chunks:
    bind_helpers()
    start_model_parallel(_LAYOUT)
    return _refilled(build_chunks(make_config(_SPEC, _LAYOUT), _LAYOUT), step)


def _tensors(chunks: Chunks) -> dict[str, torch.Tensor]:
    found = {}
    for index, chunk in enumerate(chunks):
        for name, value in chunk.state_dict().items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                found[f"{index}.{name}"] = value
    return found


def _refilled(chunks: Chunks, step: int) -> Chunks:
    """Fill the chunks with what belongs to ``step`` and this rank."""
    seed = RANKS * step + torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in _tensors(chunks).values():
            value.normal_(generator=generator)
    return chunks


def _digests(chunks: Chunks) -> dict[str, str]:
    return {
        name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for name, value in _tensors(chunks).items()
    }


def _save(chunks: Chunks, folder: str, step: int) -> None:
    """Save as ``nemo.checkpointing.HybridCheckpoint`` does, without NeMo."""
    directory, first = checkpoint_of(folder, step), torch.distributed.get_rank() == 0
    mark = directory.with_name(f"{directory.name}-unfinished")
    if first:
        mark.touch()
        begin_checkpoint(directory)
        (directory / "weights").mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(model_sharded_state_dict(chunks), str(directory / "weights"))
    if first:
        finish_checkpoint(directory, _IDENTITY, step)
        mark.unlink()
        prune(directory.parent, directory, KEEP_LAST)
    torch.distributed.barrier()


def _arrange(kill: Kill, folder: str, victims: list[int]) -> None:
    def strike() -> None:
        for process in victims:
            os.kill(process, signal.SIGKILL)

    if kill.seconds is not None:
        seconds = kill.seconds
        threading.Thread(target=lambda: (time.sleep(seconds), strike()), daemon=True).start()
        return
    left = [kill.event or 1]

    def count_down() -> None:
        left[0] -= 1
        if left[0] == 0:
            strike()

    _on_file_event(folder, count_down)


_FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def _on_file_event(folder: str, act: Callable[[], None]) -> None:
    """Call ``act`` before this process, not one forked from it, touches a file in ``folder``."""
    own = os.getpid()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS and os.getpid() == own and str(arguments[0]).startswith(folder):
            act()

    sys.addaudithook(hook)
