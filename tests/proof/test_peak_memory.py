"""The peak of a rank's tensors."""

from __future__ import annotations

import torch

from nemo_megacpp.proof.peak_memory import PeakMemory


def test_a_peak_counts_every_storage_while_it_is_alive() -> None:
    before = torch.zeros(1000, dtype=torch.float64)
    memory = PeakMemory()
    memory.start()
    one = before + 1
    view = one.view(10, 100)[1:]
    del one
    two = view * 2  # before, one and two: 8,000 + 8,000 + 7,200
    del view
    three = two[:1] + two[:1]  # one is freed: a smaller sum
    peak = memory.stop()
    del two, three
    memory.start()
    least = memory.stop()
    assert peak - least == 8_000 + 7_200


def test_what_recompute_frees_is_not_held() -> None:
    weight = torch.zeros(64, 64, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = torch.tanh(x @ weight)
        return x

    def peak(recompute: bool) -> int:
        weight.grad = None
        x = torch.zeros(512, 64, requires_grad=True)
        memory = PeakMemory()
        memory.start()
        for _ in range(4):
            if recompute:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        x.sum().backward()
        return memory.stop()

    assert peak(recompute=True) < 0.6 * peak(recompute=False)
