"""Where the time of a step of ``nam56r_tiny`` at TP=2 goes: by block family and part.

    python -m benchmarks.tp_step

Two ranks with Megatron's data-parallel wrapper, schedule and optimizer, without NeMo. A layer's
forward pass is timed between its hooks, its backward pass between the gradients of its output and
of its input, each by the clock and by the CPU time of the rank's thread: what is left between the
two is waiting for the other rank, and for a core on a loaded machine. A description without a peer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Row, Sample, common_arguments, finish, start
from nemo_megacpp.runtime.workers import WorkerPool, device_for

RECIPE = "nam56r_tiny"
Parts = dict[str, tuple[float, float]]
"""Part of a step -> seconds by the clock, and of CPU."""


class Laps:
    """Adds up the time between two marks under the name of the part that ends at the second."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.thread_time()

    def mark(self, part: str) -> None:
        """The time since the last mark was ``part``'s."""
        now = self._now()
        for index in range(2):
            self.parts[part][index] += now[index] - self._last[index]
        self._last = now

    def after(self, work: Callable[..., Any], part: str) -> Any:
        """Return what ``work`` returns; its time is ``part``'s."""
        result = work()
        self.mark(part)
        return result


def watch(model: Any, laps: Laps) -> None:
    """Mark the borders of embedding, layers, head and loss, in both directions."""
    stack = model.decoder

    def border(before: str, after: str) -> Callable[[torch.Tensor], None]:
        """A tensor between two parts: the first has run forward, the second backward."""

        def forward(tensor: torch.Tensor) -> None:
            laps.mark(f"{before}, forward")
            if tensor.requires_grad:
                tensor.register_hook(lambda _: laps.mark(f"{after}, backward"))

        return forward

    names = [family.value for family in stack.families]
    for index, layer in enumerate(stack.layers):
        at = border(names[index - 1] if index else "embedding", names[index])

        def entering(_: Any, inputs: Any, kwargs: Any, at: Any = at) -> None:
            at(kwargs["hidden_states"] if "hidden_states" in kwargs else inputs[0])

        layer.register_forward_pre_hook(entering, with_kwargs=True)
    at_norm = border(names[-1], "head and loss")
    stack.final_norm.register_forward_pre_hook(lambda _, inputs: at_norm(inputs[0]))


def profile_steps(steps: int, threads: int) -> tuple[list[float], Parts]:
    """On a rank: the seconds of each step, and the parts of a step, on average."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from nemo_megacpp.config import HybridConfig, config_fields
    from nemo_megacpp.recipes.catalog import CATALOG
    from nemo_megacpp.runtime.distributed import start_model_parallel
    from nemo_megacpp.runtime.host import current_host
    from nemo_megacpp.specs.hybrid_model import build_hybrid_model

    torch.set_num_threads(threads)
    recipe = CATALOG[RECIPE]
    start_model_parallel(recipe.layout)
    device = current_host().device
    fields = config_fields(recipe.model, recipe.layout, torch.float32, device)
    config = HybridConfig(**fields)
    model = build_hybrid_model(config).to(device)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, params_dtype=torch.float32),
        [wrapped],
        use_gloo_process_groups=False,
    )
    rows = recipe.training.micro_batch_size
    micro = recipe.training.global_batch_size // rows
    torch.manual_seed(parallel_state.get_data_parallel_rank())
    tokens = torch.randint(config.vocab_size, (rows, config.seq_length + 1), device=device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(config.seq_length, device=device)[None].expand_as(inputs)
    laps = Laps()
    watch(model, laps)
    seconds: list[float] = []
    for index in range(steps + 1):
        if index == 1:  # the first step warms up
            laps.parts.clear()
        before = time.perf_counter()
        laps.mark("between steps")
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        laps.mark("zero gradients")
        for _ in range(micro):
            loss = wrapped(inputs, positions, None, labels=labels).mean() / micro
            laps.mark("head and loss, forward")
            loss.backward()
            laps.mark("embedding, backward")
        laps.after(lambda: finalize_model_grads([wrapped]), "gradients: finalize")
        laps.after(optimizer.step, "optimizer")
        seconds.append(time.perf_counter() - before)
    parts = {name: (wall / steps, cpu / steps) for name, (wall, cpu) in laps.parts.items()}
    return seconds[1:], parts


def main() -> int:
    """Profile, and print the parts as rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser)
    arguments = parser.parse_args()
    device = start(arguments)
    if device.type == "cuda" and device_for(2) != "cuda":
        return finish(arguments, [], [("tp_step", "two ranks need two GPUs")])
    with WorkerPool(2, 1, device_for(2) if device.type == "cuda" else "cpu") as pool:
        (seconds, parts), _ = pool.run(2, profile_steps, 1 if arguments.quick else 5, 1)
    peer = "CPU time of the same"
    sizes = f"{RECIPE} TP=2 SP float32, rank 0"
    rows = [Row("tp_step: a step", Sample(seconds), None, "", sizes)]
    for name, (wall, cpu) in sorted(parts.items(), key=lambda item: -item[1][1]):
        rows.append(Row(f"tp_step: {name}", Sample([wall]), Sample([cpu]), peer, sizes))
    return finish(arguments, rows)


if __name__ == "__main__":
    sys.exit(main())
