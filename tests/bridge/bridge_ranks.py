"""Runs of a recipe through Bridge in the shared ranks, each in a process of its own.

Importing this module imports Bridge, which takes seconds: the pool does so once, and forks for
every run.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_megacpp.runtime.host import ensure_host

ensure_host(bridge=True)

from megatron.bridge.training.callbacks import CallbackContext  # noqa: E402
from megatron.bridge.training.pretrain import pretrain  # noqa: E402, F401  (what takes the time)

from nemo_megacpp.bridge import forward_step, worker  # noqa: E402, F401
from nemo_megacpp.bridge.callbacks import StopOnSigterm  # noqa: E402
from nemo_megacpp.bridge.door import BRIDGE  # noqa: E402
from nemo_megacpp.recipes.recipe import resolve  # noqa: E402
from nemo_megacpp.runtime.launch import rank_environment  # noqa: E402
from nemo_megacpp.start import train_recipe  # noqa: E402


def run_train(overrides: list[str], hook: Callable[..., None] | None = None, *args: Any) -> None:
    """``nemo-megacpp train nam56r_tiny … --through bridge`` under torchrun, after ``hook(*args)``
    has changed this rank."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(rank_environment(rank, world))
    os.environ["WANDB_MODE"] = "offline"
    if hook is not None:
        hook(*args)
    train_recipe(resolve("nam56r_tiny", overrides), door=BRIDGE)


def sigterm(event: str, rank: int, after: int) -> None:
    """Send SIGTERM to a rank at an event of Bridge's loop, once ``after`` steps are counted."""
    stock = getattr(StopOnSigterm, event)

    def sends(self: StopOnSigterm, context: CallbackContext) -> None:
        if torch.distributed.get_rank() == rank and context.state.train_state.step == after:
            os.kill(os.getpid(), signal.SIGTERM)
        stock(self, context)

    setattr(StopOnSigterm, event, sends)


def interrupt(after: int) -> None:
    """Interrupt a rank, as Ctrl-C does, in the step that follows ``after`` steps."""
    stock = StopOnSigterm.on_train_step_end

    def interrupted(self: StopOnSigterm, context: CallbackContext) -> None:
        if context.state.train_state.step == after:
            raise KeyboardInterrupt
        stock(self, context)

    StopOnSigterm.on_train_step_end = interrupted  # type: ignore[method-assign]


def nan_loss(rank: int, microbatch: int) -> None:
    """Let the loss of a rank's microbatch be NaN."""
    stock, seen = forward_step.microbatch_loss, []

    def loss(losses: torch.Tensor, *args: Any) -> Any:
        seen.append(None)
        broken = torch.distributed.get_rank() == rank and len(seen) == microbatch
        return stock(losses * float("nan") if broken else losses, *args)

    forward_step.microbatch_loss = loss


def note_rows(file: str) -> None:
    """Write a number of the tokens of every microbatch that is trained on, a line each."""
    stock = forward_step.deal_microbatch

    def deal(rows: dict[str, torch.Tensor]) -> Any:
        with Path(file).open("a") as lines:
            lines.write(f"{hash(tuple(rows['tokens'].flatten().tolist()))}\n")
        return stock(rows)

    forward_step.deal_microbatch = deal
