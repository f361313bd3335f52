"""Measure the machine that this process, or the ranks of a launcher, run on.

What is measured is what is sustained, so that the shares of matrix multiplications, memory and
links become 1; the other kinds of work keep their assumed share of a matrix multiplication.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from math import ceil, log2

import torch
import torch.distributed as dist

from nemo_megacpp.contract.machine import Arithmetic, Efficiency, Link, Machine
from nemo_megacpp.runtime.host import current_host
from nemo_megacpp.runtime.launch import Launched, launched

_REPEATS = 7
_SMALL = 200
"""Kernels in a row, of which the least time of one follows."""


def measure_machine(name: str) -> Machine | None:
    """Return this machine; on ranks other than the first None.

    Ranks of a launcher time their links together: those of a node, and, if there are several nodes,
    the ranks of one place on each. Takes seconds.

    Args:
        name: of the machine.
    """
    host = current_host()
    place = launched() or Launched(0, 1, 1)
    device = torch.device("cpu")
    if host.device == "cuda":
        device = torch.device("cuda", place.rank % place.local_world_size)
        torch.cuda.set_device(device)
    if place.world_size > 1:
        dist.init_process_group(host.backend)
    try:
        machine = _measured(name, place, device)
    finally:
        if place.world_size > 1:
            dist.destroy_process_group()
    return machine if place.rank == 0 else None


def _measured(name: str, place: Launched, device: torch.device) -> Machine:
    is_gpu, node = device.type == "cuda", place.local_world_size
    dtypes: dict[Arithmetic, torch.dtype] = {"fp32": torch.float32}
    if is_gpu:
        dtypes["bf16"] = torch.bfloat16
    flops = {key: _slowest(_matmul(dtype, device), device) for key, dtype in dtypes.items()}
    memory = _slowest(_copy(device), device)
    small = torch.zeros(1, device=device)
    least = 1 / _slowest(_SMALL / _seconds(lambda: [small.add_(1) for _ in range(_SMALL)]), device)
    in_node, between, source = _links(place, device, memory)
    share = Efficiency()
    return Machine(
        name=name,
        gpus_per_node=node,
        hbm_bytes=_memory(device, node),
        hbm_bandwidth=memory,
        flops=flops,
        in_node=in_node,
        between_nodes=between,
        kernel_seconds=least,
        efficiency=Efficiency(
            matmul=1.0,
            grouped_matmul=share.grouped_matmul / share.matmul,
            attention=share.attention / share.matmul,
            scan=share.scan / share.matmul,
            memory=1.0,
            link=1.0,
        ),
        source=f"measured on {place.world_size} rank{'s' * (place.world_size > 1)}, "
        f"{_device_name(device)}{source}",
    )


def _links(place: Launched, device: torch.device, memory: float) -> tuple[Link, Link, str]:
    """Return the links in a node and between nodes, and what of them was not measured."""
    node, world = place.local_world_size, place.world_size
    if world == 1:
        link = Link(bandwidth=memory, latency=0.0)
        return link, link, "; links not measured: one rank"
    nodes = [list(range(first, first + node)) for first in range(0, world, node)]
    across = [list(range(first, world, node)) for first in range(node)]
    found = [_link(groups, device) for groups in (nodes, across)]
    inside, between = found[0] or found[1], found[1] or found[0]
    assert inside is not None and between is not None
    if found[1] is None:
        return inside, between, "; between nodes not measured: one node"
    return inside, between, "" if found[0] else "; inside a node not measured: one rank a node"


def _link(groups: list[list[int]], device: torch.device) -> Link | None:
    """Time the all-reduce of all ``groups`` at once."""
    size = len(groups[0])
    if size == 1:
        return None
    group, _ = dist.new_subgroups_by_enumeration(groups)
    large = torch.zeros((64 << 20 if device.type == "cuda" else 2 << 20) // 4, device=device)
    small = torch.zeros(1, device=device)
    bytes_sent = 2 * large.numel() * 4 * (size - 1) / size
    latency = _seconds(lambda: dist.all_reduce(small, group=group)) / (2 * ceil(log2(size)))
    seconds = _seconds(lambda: dist.all_reduce(large, group=group))
    return Link(
        bandwidth=_slowest(bytes_sent / seconds, device),
        latency=1 / _slowest(1 / latency, device),
    )


def _matmul(dtype: torch.dtype, device: torch.device) -> float:
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: left @ right)


def _copy(device: torch.device) -> float:
    source = torch.zeros((1 << 30 if device.type == "cuda" else 64 << 20), dtype=torch.uint8)
    source = source.to(device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source))


def _seconds(work: Callable[[], object]) -> float:
    """Return the median time of ``work``, after one run to warm up."""
    times = []
    for _ in range(_REPEATS + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _slowest(rate: float, device: torch.device) -> float:
    """Return the least rate of all ranks."""
    if not dist.is_initialized():
        return rate
    rates = torch.tensor([rate], device=device)
    dist.all_reduce(rates, op=dist.ReduceOp.MIN)
    return float(rates)


def _memory(device: torch.device, ranks: int) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads a rank"
