"""The peaks that MFU is relative to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nemo_megacpp.runs.summary import show_step

BF16 = SimpleNamespace(bf16=True, fp8=None)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", None),
        ("NVIDIA H800", None),
        ("no GPU", None),
    ],
)
def test_the_peak_is_that_of_the_device_or_not_known(device: str, peak: float | None) -> None:
    from nemo_megacpp.runs.throughput import peak_tflops

    assert peak_tflops(device, BF16) == peak


def test_fp32_and_fp8_have_no_single_peak() -> None:
    from nemo_megacpp.runs.throughput import peak_tflops

    assert peak_tflops("NVIDIA H200", SimpleNamespace(bf16=False, fp8=None)) is None
    assert peak_tflops("NVIDIA H200", SimpleNamespace(bf16=True, fp8="hybrid")) is None


def test_the_line_of_a_step() -> None:
    record = {
        **{"step": 2, "loss": 7.30754, "grad_norm": 3.5351, "aux": {"load": 1.01}},
        **{"tokens_per_second": 7670.0, "tflops_per_rank": 0.0388, "seconds": 0.271},
        "memory": 2**30,
    }
    assert show_step(record, 20, 7.2492, "rank") == (
        "step     2/20  loss 7.3075  held-out 7.2492  load 1.010  grad norm 3.535  "
        "7,670 tokens/s  38.8 GFLOP/s per rank  0.27 s  1.00 GiB"
    )
