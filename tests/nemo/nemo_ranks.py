"""Runs of a recipe in the shared ranks, each in a process of its own.

Importing this module imports NeMo, which takes seconds: a rank does so once, and forks for every
run.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import fiddle
import torch
from nemo.collections import llm  # noqa: F401  (what takes the time)

from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.runtime.launch import rank_environment
from nemo_megacpp.start import train_recipe


def take_place(port: int) -> None:
    """Be one of the ranks that torchrun would have started."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.barrier()  # the others may still be connecting
    torch.distributed.destroy_process_group()  # NeMo makes its own
    os.environ.update(rank_environment(rank, world, port))


def run_train(port: int, overrides: list[str]) -> None:
    """``nemo-megacpp train nam56r_tiny …`` under torchrun."""
    take_place(port)
    train_recipe(resolve("nam56r_tiny", overrides))


def run_train_without_random_state(port: int, overrides: list[str]) -> None:
    """The same on a checkpoint that keeps no random state."""
    with mock.patch("nemo_megacpp.nemo.strategy.load_random_state", lambda folder: None):
        run_train(port, overrides)


def run_factory(port: int, settings: dict[str, Any]) -> None:
    """``nemo llm pretrain --factory "nam56r_tiny(…)"`` under torchrun."""
    take_place(port)
    from nemo_megacpp.nemo.factories import nam56r_tiny

    fiddle.build(nam56r_tiny(**settings))()


def load_whole_context(saved: str, tp: int) -> None:
    """NeMo constructs a run's objects again from what it wrote down of them."""
    from nemo.lightning.io import load_context

    context = load_context(saved)
    assert type(context.trainer.strategy).__name__ == "HybridStrategy"
    assert context.trainer.strategy.parallelism.tensor_model_parallel_size == tp
    assert {"RunRecorder", "StopEarly"} <= {type(one).__name__ for one in context.trainer.callbacks}
    assert context.model.config.hybrid_pattern == "AEMR"
    assert context.extra["datamodule"].seq_length == context.model.config.seq_length
