"""Sizes as people write them."""

from __future__ import annotations

import pytest

from nemo_megacpp.commands.arguments import read_gpu_memory
from nemo_megacpp.errors import UserError
from nemo_megacpp.render import show_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("141GB", 141 * 10**9), ("80GiB", 80 * 2**30), (" 40.5 gb", 40_500_000_000)]
)
def test_a_gpus_memory(text: str, size: int) -> None:
    assert read_gpu_memory(text) == size


@pytest.mark.parametrize("text", ["141", "h200", "GB", "-80GB", "80 apples", "5MB", "7TB", ""])
def test_no_gpus_memory(text: str) -> None:
    with pytest.raises(UserError):
        read_gpu_memory(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (12_345, "12.3 KB"), (141e9, "141 GB")],
)
def test_shown(size: float, text: str) -> None:
    assert show_bytes(size) == text
