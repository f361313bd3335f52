"""The machines that have a name. Peaks are those of the vendor's data sheets, without sparsity.

Latencies are assumed: about what small messages of NCCL take over NVLink, PCIe and InfiniBand.
"""

from __future__ import annotations

from pathlib import Path

from nemo_megacpp.contract.machine import Link, Machine, read_machine_file
from nemo_megacpp.errors import UserError, nearest

DEFAULT = "dgx-h100"

_NDR = Link(bandwidth=50e9, latency=8e-6)
"""One 400 Gb/s InfiniBand or Ethernet port for each GPU."""


def _hopper(name: str, hbm_bytes: int, hbm_bandwidth: float, source: str) -> Machine:
    """A DGX with eight GPUs that differ by their memory alone."""
    return Machine(
        name=name,
        gpus_per_node=8,
        hbm_bytes=hbm_bytes,
        hbm_bandwidth=hbm_bandwidth,
        flops={"fp32": 67e12, "bf16": 989e12, "fp8": 1979e12},
        in_node=Link(bandwidth=450e9, latency=3e-6),
        between_nodes=_NDR,
        source=source,
    )


PRESETS = {
    machine.name: machine
    for machine in (
        _hopper(
            "dgx-h100",
            *(80 * 10**9, 3.35e12),
            "NVIDIA H100 data sheet (SXM): 989 TFLOP/s BF16 and 1,979 FP8 (half of those with "
            "sparsity), 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways; DGX H100: 8 x 400 Gb/s",
        ),
        _hopper(
            "dgx-h200",
            *(141 * 10**9, 4.8e12),
            "NVIDIA H200 data sheet (SXM): the H100's peaks, 141 GB, 4.8 TB/s, NVLink 900 GB/s "
            "both ways; DGX H200: 8 x 400 Gb/s",
        ),
        Machine(
            name="gb200-nvl72",
            gpus_per_node=72,
            hbm_bytes=186 * 10**9,
            hbm_bandwidth=8e12,
            flops={"fp32": 80e12, "bf16": 2500e12, "fp8": 5000e12},
            in_node=Link(bandwidth=900e9, latency=3e-6),
            between_nodes=_NDR,
            source="NVIDIA GB200 NVL72 data sheet, a 72nd of the rack: 2,500 TFLOP/s BF16 and "
            "5,000 FP8 (half of those with sparsity), 186 GB, 8 TB/s, NVLink 1.8 TB/s both ways; "
            "one 400 Gb/s port a GPU",
        ),
        Machine(
            name="a100-pcie",
            gpus_per_node=8,
            hbm_bytes=80 * 10**9,
            hbm_bandwidth=1.935e12,
            flops={"fp32": 19.5e12, "bf16": 312e12},
            in_node=Link(bandwidth=32e9, latency=10e-6),
            between_nodes=Link(bandwidth=12.5e9, latency=15e-6),
            source="NVIDIA A100 80GB PCIe data sheet: 312 TFLOP/s BF16, 1.935 TB/s, PCIe 4.0 x16 "
            "64 GB/s both ways, no NVLink bridges; network assumed: 100 Gb/s a GPU",
        ),
    )
}


def find_machine(text: str) -> Machine:
    """Return the machine of this name, or the one that a JSON file describes.

    Raises:
        UserError: there is none, or the file cannot be read.
    """
    if text in PRESETS:
        return PRESETS[text]
    if Path(text).suffix == ".json":
        return read_machine_file(Path(text))
    raise UserError(
        f"There is no machine {text!r}.{nearest(text, PRESETS)} Machines: {', '.join(PRESETS)}; or "
        f"a .json file that 'nemo-megacpp measure-machine' has written."
    )
