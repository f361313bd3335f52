"""Time Mamba-3's scan in plain torch beside a loop over tokens and beside our Mamba-2 scan.

python -m benchmarks.mamba3
python -m benchmarks.mamba3 --device cuda   # beside mamba_ssm's Triton kernel, in bfloat16
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, common_arguments, finish, paired, start
from benchmarks.ssd import LENGTHS, agree, growth_rows, scan_inputs, step_of
from benchmarks.ssd import Sizes as SsdSizes
from nemo_megacpp.mixer_settings import Mamba3Dimensions
from nemo_megacpp.mixers.kernels.mamba3_gpu import mamba3_gpu, mamba3_gpu_reason
from nemo_megacpp.mixers.kernels.mamba3_scan import mamba3_chunked
from nemo_megacpp.mixers.kernels.ssd import ssd_chunked
from tests.mixers.kernels.naive import mamba3_naive

HEADS, HEAD_DIM, STATE, ANGLES = 16, 64, 64, 16


def inputs_of(length: int, rank: int, device: torch.device) -> dict[str, Tensor]:
    """Return the arguments of the scan, one group of heads."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    inputs = {
        "x": normal(1, length, HEADS, HEAD_DIM),
        "B": normal(1, length, rank, 1, STATE) / math.sqrt(STATE),
        "C": normal(1, length, rank, 1, STATE),
        "B_bias": torch.ones(HEADS, rank, STATE, device=device) / math.sqrt(STATE),
        "C_bias": torch.ones(HEADS, rank, STATE, device=device),
        "dt": 0.1 * F.softplus(normal(1, length, HEADS)),
        "A": -F.softplus(normal(1, length, HEADS)),
        "lam": torch.rand(1, length, HEADS, device=device),
        "angle_rate": math.pi * torch.tanh(normal(1, length, ANGLES)),
        "D": torch.ones(HEADS, device=device),
    }
    if rank > 1:
        inputs["mimo_x"] = torch.full((HEADS, rank, HEAD_DIM), 1 / rank, device=device)
    return {name: t.requires_grad_() for name, t in inputs.items()}


def ours(**inputs: Tensor) -> Tensor:
    return mamba3_chunked(**inputs)[0]


def loop(**inputs: Tensor) -> Tensor:
    return mamba3_naive(**inputs)[0]


def kernel(**inputs: Tensor) -> Tensor:
    """mamba_ssm's kernel, which takes λ and the angles before their activations."""
    t = {name: x.bfloat16() if name in ("x", "B", "C") else x for name, x in inputs.items()}
    trap, theta = torch.logit(t.pop("lam")), torch.atanh(t.pop("angle_rate") / math.pi)
    return mamba3_gpu(**t, trap=trap, theta=theta)


def main() -> int:
    """Parse the command line, compare, print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser)
    arguments = parser.parse_args()
    device, repeats = start(arguments), arguments.repeats
    torch.backends.cuda.matmul.allow_tf32 = False
    length = 128 if arguments.quick else 2048
    rows, skipped = [], []
    for rank in (1, 4):
        sizes = f"b=1 l={length} h={HEADS} p={HEAD_DIM} n={STATE} r={rank} float32"
        inputs = inputs_of(length, rank, device)
        mine, theirs = step_of(ours, inputs), step_of(loop, inputs)
        agree(mine(), theirs(), 1e-3)
        rows.append(
            Row(
                f"mamba3, rank {rank}, forward and backward",
                *paired(mine, theirs, repeats=repeats, device=device),
                peer_name="a loop over tokens",
                sizes=sizes,
                aim="at least 5x",
                aim_ratio=5.0,
            )
        )
        if rank == 1:
            single, shown = mine, sizes
    ssd = step_of(ssd_chunked, scan_inputs(SsdSizes(length, 0, HEADS, HEAD_DIM, STATE), device))
    rows.append(
        Row(
            "mamba3, rank 1, beside our Mamba-2 scan",
            *paired(single, ssd, repeats=repeats, device=device),
            peer_name="ssd_chunked",
            sizes=shown,
            aim="within 2x",
            aim_ratio=0.5,
        )
    )
    dims = Mamba3Dimensions(HEADS, HEAD_DIM, STATE, num_groups=1, num_angles=ANGLES)
    reason = mamba3_gpu_reason(dims, dtype=torch.bfloat16, device=device)
    if reason is None:
        step = step_of(kernel, inputs_of(length, 1, device))
        both = paired(single, step, repeats=repeats, device=device)
        rows.append(Row("mamba3, rank 1", *both, peer_name="mamba_ssm, bfloat16", sizes=shown))
    else:
        skipped.append(("mamba_ssm's Triton kernel", f"it {reason}"))
    rows += growth_rows(
        lambda length: step_of(ours, inputs_of(length, 1, device)),
        LENGTHS[:2] if arguments.quick else LENGTHS[:4],
        repeats,
        device,
        "mamba3",
        shown,
    )
    return finish(arguments, rows, skipped)


if __name__ == "__main__":
    sys.exit(main())
