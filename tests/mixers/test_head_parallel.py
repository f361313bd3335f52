"""The choice between a mixer's Triton kernel and its PyTorch form."""

from __future__ import annotations

import logging

import pytest
import torch

from nemo_megacpp.mixers.head_parallel import choose_triton, log_once


@pytest.mark.parametrize(
    ("kernel", "device", "level"),
    [("auto", "cuda", "WARNING"), ("auto", "cpu", "INFO"), ("torch", "cuda", None)],
)
def test_auto_warns_of_a_loop_on_a_gpu(
    caplog: pytest.LogCaptureFixture, kernel: str, device: str, level: str | None
) -> None:
    """Once, with the reason and what to do; nobody is warned of what he chose."""
    log_once.cache_clear()
    logger = logging.getLogger("nemo_megacpp")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="nemo_megacpp")
    try:
        for _layer in range(2):
            assert not choose_triton(
                kernel,  # type: ignore[arg-type]
                lambda: "needs Triton",
                "M²RNN",
                "m2rnn_kernel",
                device=torch.device(device),
                loop="the tokens",
                remedy="Install triton.",
            )
    finally:
        logger.removeHandler(caplog.handler)
    said = {(record.levelname, record.getMessage()) for record in caplog.records}
    assert {name for name, _ in said} == ({level} if level else set())
    if level == "WARNING":
        ((_, message),) = said
        for part in ("Python loop over the tokens", "needs Triton", "Install triton."):
            assert part in message
