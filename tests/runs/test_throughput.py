"""The peaks that MFU is relative to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

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
