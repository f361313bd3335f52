"""Time Mamba-2 in plain torch: the whole mixer beside Hugging Face's, the scan beside fla's naive
chunk form and a loop over tokens; its share of the matmul peak, and how time and memory grow.

    python -m benchmarks.ssd
    python -m benchmarks.ssd --device cuda      # beside mamba_ssm's Triton kernels

Operations are the fewest that the algorithm needs in chunks of 64, three times the forward's: of
scores and their products the causal half, one product of C and B for each group, no recomputation.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    Row,
    Sample,
    common_arguments,
    explain,
    finish,
    matmul_peak,
    paired,
    peak_bytes,
    start,
)
from nemo_megacpp.mixers.kernels.gated_rms_norm import gated_rms_norm
from nemo_megacpp.mixers.kernels.mamba_split_conv1d_scan import mamba_split_conv1d_scan
from nemo_megacpp.mixers.kernels.ssd import ssd_chunked
from tests.mixers.kernels.naive import ssd_naive

CHUNK = 64
LENGTHS = (512, 1024, 2048, 4096, 8192)


class Sizes(NamedTuple):
    length: int
    hidden: int
    heads: int
    head_dim: int = 64
    state: int = 64
    groups: int = 1

    def show(self) -> str:
        return "b=1 l={} hidden={} h={} p={} n={} g={} float32".format(*self)

    def operations(self) -> float:
        inner = self.heads * self.head_dim
        in_chunks = CHUNK * (self.groups * self.state + inner)
        return 3.0 * self.length * (in_chunks + 4 * inner * self.state)


TINY = Sizes(64, 64, 4, 16, 16)
MIDDLE = Sizes(2048, 512, 16)
NAM56R = Sizes(512, 3584, 56, groups=8)


def scan_inputs(sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """Return the arguments of the scan, as after a mixer's convolution and softplus."""
    torch.manual_seed(0)
    length, _, heads, head_dim, state, groups = sizes

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    inputs = {
        "x": normal(1, length, heads, head_dim),
        "dt": 0.1 * F.softplus(normal(1, length, heads)),
        "A": -1 - 15 * torch.rand(heads, device=device),
        "B": normal(1, length, groups, state) / math.sqrt(state),
        "C": normal(1, length, groups, state),
    }
    return {name: t.requires_grad_() for name, t in inputs.items()}


def step_of(form: Callable[..., Any], inputs: dict[str, Tensor]) -> Callable[[], list[Tensor]]:
    """Return a function that runs forward and backward: the output and every gradient."""
    with torch.no_grad():
        shape = form(**inputs)
    torch.manual_seed(1)
    weight = torch.randn_like(shape)

    def step() -> list[Tensor]:
        y = form(**inputs)
        return [y, *torch.autograd.grad(y, list(inputs.values()), weight)]

    return step


def agree(ours: list[Tensor], peers: list[Tensor], tolerance: float = 1e-4) -> None:
    """Raise unless every tensor is the peer's, to ``tolerance`` of its largest value."""
    for mine, theirs in zip(ours, peers, strict=True):
        error = float((mine - theirs).abs().max() / theirs.abs().max())
        assert error <= tolerance, f"the forms differ by {error:.1e} of the largest value"


def naive_chunk_of_fla() -> Callable[..., Any]:
    """fla's plain torch form, from its file: importing the package wants a GPU."""
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        raise ImportError("not installed")
    path = Path(found.submodule_search_locations[0]) / "ops" / "simple_gla" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chunk = module.naive_chunk_simple_gla

    def form(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        repeat = x.shape[2] // B.shape[2]
        B, C = (t.repeat_interleave(repeat, dim=2) for t in (B, C))
        y, _ = chunk(C, B, x * dt[..., None], A * dt, chunk_size=CHUNK, scale=1.0)
        return y

    return form


def kernel_of_mamba_ssm() -> Callable[..., Any]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def form(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256)

    return form


def mixers(sizes: Sizes, device: torch.device) -> tuple[Callable, Callable]:
    """Return our whole mixer and Hugging Face's with the same weights, forward and backward."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    length, hidden, heads, head_dim, state, groups = sizes
    config = Mamba2Config(
        hidden_size=hidden,
        num_heads=heads,
        head_dim=head_dim,
        state_size=state,
        n_groups=groups,
        expand=heads * head_dim / hidden,
        chunk_size=CHUNK,  # with its default of 256 it takes longer and four times the memory
        use_bias=False,
        time_step_limit=(0.0, math.inf),
    )
    torch.manual_seed(0)
    peer = Mamba2Mixer(config, layer_idx=0).to(device)
    with torch.no_grad():
        peer.dt_bias.copy_(torch.linspace(-4, -1, heads))
    parameters = dict(peer.named_parameters())
    inputs = {"hidden_states": torch.randn(1, length, hidden, device=device).requires_grad_()}

    def ours(hidden_states: Tensor, **_: Tensor) -> Tensor:
        y = mamba_split_conv1d_scan(
            F.linear(hidden_states, peer.in_proj.weight),
            peer.conv1d.weight.squeeze(1),
            peer.conv1d.bias,
            peer.dt_bias,
            -torch.exp(peer.A_log),
            peer.D,
            chunk_size=128,
            headdim=head_dim,
            ngroups=groups,
        )
        y = gated_rms_norm(y, peer.norm.weight, eps=peer.norm.variance_epsilon)
        return F.linear(y, peer.out_proj.weight)

    def theirs(hidden_states: Tensor, **_: Tensor) -> Tensor:
        return peer.torch_forward(hidden_states)

    leaves = inputs | parameters
    return step_of(ours, leaves), step_of(theirs, leaves)


def mixer_rows(
    device: torch.device, repeats: int, named: dict[str, Sizes], peak: float
) -> list[Row]:
    """Compare whole mixers: time, and peak memory at the middle size."""
    rows = []
    peer_name = f"transformers {version('transformers')} Mamba2Mixer.torch_forward, chunks of 64"
    for name, sizes in named.items():
        ours, peer = mixers(sizes, device)
        agree(ours(), peer())
        mine, theirs = paired(ours, peer, repeats=repeats, device=device)
        inner = sizes.heads * sizes.head_dim
        rows_in = 2 * inner + 2 * sizes.groups * sizes.state + sizes.heads
        projections = 6.0 * sizes.length * sizes.hidden * (rows_in + inner)
        row = Row(
            f"mixer, forward and backward, {name}",
            mine,
            theirs,
            peer_name,
            sizes.show(),
            operations=sizes.operations() + projections,
            peak=peak,
            aim="at least 2x",
            aim_ratio=2.0,
        )
        rows.append(explain(row, ours, device))
        if sizes.length == MIDDLE.length:
            used = (Sample([float(peak_bytes(work, device))], "B") for work in (ours, peer))
            rows.append(Row(f"mixer, peak memory, {name}", *used, peer_name, sizes.show()))
    return rows


def scan_rows(
    device: torch.device, repeats: int, sizes: Sizes, peak: float, skipped: list[tuple[str, str]]
) -> list[Row]:
    """Compare the scan alone."""
    inputs = scan_inputs(sizes, device)
    ours = step_of(ssd_chunked, inputs)
    peers = {"a loop over tokens": lambda: ssd_naive}
    peers["fla simple_gla, naive chunk"] = naive_chunk_of_fla
    if device.type == "cuda":
        peers["mamba_ssm's Triton kernel"] = kernel_of_mamba_ssm
    rows = []
    for name, load in peers.items():
        try:
            peer = step_of(load(), inputs)
        except ImportError as error:
            skipped.append((name, str(error)))
            continue
        agree(ours(), peer(), 1e-2 if device.type == "cuda" else 1e-4)
        mine, theirs = paired(ours, peer, repeats=repeats, device=device)
        rows.append(Row("scan, forward and backward", mine, theirs, name, sizes.show()))
    alone, _ = paired(ours, None, repeats=2 * repeats, device=device)
    row = Row(
        "scan, share of the matmul peak",
        alone,
        None,
        "",
        sizes.show(),
        operations=sizes.operations(),
        peak=peak,
        aim="at least 30% of peak",
        aim_share=0.3,
    )
    return [*rows, explain(row, ours, device)]


def growth_rows(
    step_at: Callable[[int], Callable[[], object]],
    lengths: tuple[int, ...],
    repeats: int,
    device: torch.device,
    what: str,
    sizes: str,
) -> list[Row]:
    """Exponents of time and peak memory in the length, by least squares over ``lengths``."""
    steps = {length: step_at(length) for length in lengths}
    memory = {length: [float(peak_bytes(step, device))] for length, step in steps.items()}
    times: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(repeats):  # in turn, so that a slow moment strikes every length
        for length, step in steps.items():
            sample, _ = paired(step, None, repeats=1, device=device)
            times[length] += sample.values
    title = f"{what}, l={lengths[0]} to {lengths[-1]}"
    rows = []
    for name, found, most in (("time", times, 1.1), ("peak memory", memory, 1.02)):
        slope = Sample([exponent(found)], "")
        claim = f"{title}: exponent of {name}"
        rows.append(Row(claim, slope, sizes=sizes, aim=f"at most {most}", aim_at_most=most))
    return rows


def exponent(found: dict[int, list[float]]) -> float:
    """The slope of log value over log length; of each length the least value."""
    points = [(math.log(length), math.log(min(values))) for length, values in found.items()]
    x, y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def main() -> int:
    """Parse the command line, compare, print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser)
    arguments = parser.parse_args()
    device, repeats = start(arguments), arguments.repeats
    torch.backends.cuda.matmul.allow_tf32 = False
    peak = matmul_peak(device, torch.float32)
    named = {"tiny": TINY}
    if not arguments.quick:
        named |= {"middle": MIDDLE, "a NAM56R layer": NAM56R}
    skipped: list[tuple[str, str]] = []
    rows = []
    if importlib.util.find_spec("transformers") is None:
        skipped.append(("Hugging Face's mixer", "transformers is not installed"))
    else:
        rows += mixer_rows(device, repeats, named, peak)
    scan_sizes = TINY if arguments.quick else MIDDLE
    rows += scan_rows(device, repeats, scan_sizes, peak, skipped)
    lengths = LENGTHS[:2] if arguments.quick else LENGTHS
    rows += growth_rows(
        lambda length: step_of(
            ssd_chunked, scan_inputs(scan_sizes._replace(length=length), device)
        ),
        lengths,
        repeats,
        device,
        "scan",
        scan_sizes.show(),
    )
    return finish(arguments, rows, skipped)


if __name__ == "__main__":
    sys.exit(main())
