"""Attention of the torch backend over CP=2: keys and values in a ring beside the other exchanges.

    python -m benchmarks.cp_attention

Two ranks, core attention alone, forward and backward: time, the most memory in use, and what is
saved for the backward pass, of rank 0. The peers are the same module with another ``cp_comm_type``.
The forms' outputs and gradients must agree, or the script fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Row, Sample, common_arguments, finish, peak_bytes, start
from nemo_megacpp.runtime.workers import WorkerPool, device_for

FORMS = ("p2p", "all_gather", "a2a")
CP, HEADS, GROUPS, DIM = 2, 4, 2, 32
ROUNDING = 2e-5
"""Largest difference in float32, of the largest value."""

Figures = dict[str, tuple[list[float], int, int]]
"""Form -> seconds of each run, most bytes in use, bytes saved."""


def measure(length: int, repeats: int, threads: int) -> Figures:
    """On a rank: run the forms in turn, A B C A B C."""
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_megacpp.config import HybridConfig
    from nemo_megacpp.layout import ParallelLayout
    from nemo_megacpp.mixers.core_attention import TorchCoreAttention
    from nemo_megacpp.runtime.distributed import start_model_parallel
    from nemo_megacpp.runtime.host import current_host

    torch.set_num_threads(threads)
    layout = ParallelLayout.parse(f"cp={CP}")
    start_model_parallel(layout)
    config = HybridConfig(
        hybrid_pattern="A",
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        **layout.megatron_fields(),
    )
    torch.manual_seed(torch.distributed.get_rank())
    device = current_host().device
    query, key, value = (
        torch.randn(length // CP, 1, heads, DIM, device=device, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    form = torch.randn(length // CP, 1, HEADS * DIM, device=device)

    def work(exchange: str) -> Callable[[], list[torch.Tensor]]:
        attention = TorchCoreAttention(
            config, 1, AttnMaskType.causal, "self", cp_comm_type=exchange
        )

        def run() -> list[torch.Tensor]:
            output = attention(query, key, value, None)
            return [output.detach(), *torch.autograd.grad(output, (query, key, value), form)]

        return run

    works = {exchange: work(exchange) for exchange in FORMS}
    expected = works["all_gather"]()
    for exchange, run in works.items():
        for one, other in zip(run(), expected, strict=True):
            if (one - other).abs().max() > ROUNDING * other.abs().max():
                raise RuntimeError(f"{exchange} differs from all_gather")
    found: Figures = {}
    for exchange, run in works.items():
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved: Any = saved) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run()
        found[exchange] = ([], peak_bytes(run, device), sum(saved.values()))
    for _ in range(repeats):
        for exchange, run in works.items():
            torch.distributed.barrier()
            before = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            found[exchange][0].append(time.perf_counter() - before)
    return found


def main() -> int:
    """Measure, and print each of the other forms as the ring's peer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser)
    parser.add_argument("--length", type=int, help="tokens of the row; default 8192")
    arguments = parser.parse_args()
    device = start(arguments)
    if device.type == "cuda" and device_for(CP) != "cuda":
        return finish(arguments, [], [("cp_attention", f"{CP} ranks need {CP} GPUs")])
    length = arguments.length or (256 if arguments.quick else 8192)
    with WorkerPool(CP, 1, device.type) as pool:
        figures, _ = pool.run(CP, measure, length, arguments.repeats, 1)
    sizes = f"l={length} CP={CP} n={HEADS} g={GROUPS} d={DIM} float32, one thread a rank"
    rows = []
    for peer in FORMS[1:]:
        (ours, peak, saved), (theirs, their_peak, their_saved) = figures["p2p"], figures[peer]
        name = f"cp_comm_type={peer}"
        for what, mine, other in (
            ("forward and backward", Sample(ours), Sample(theirs)),
            ("peak memory", Sample([float(peak)], "B"), Sample([float(their_peak)], "B")),
            ("saved", Sample([float(saved)], "B"), Sample([float(their_saved)], "B")),
        ):
            rows.append(Row(f"ring attention, {what}", mine, other, name, sizes))
    return finish(arguments, rows)


if __name__ == "__main__":
    sys.exit(main())
