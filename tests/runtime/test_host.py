"""The no-GPU host tells the truth about CUDA."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="a host with a GPU is left as it is")
def test_ensure_host_twice() -> None:
    """In a process of its own: the second call wraps nothing once more, and nobody is lied to."""
    code = """
import torch
from nemo_megacpp.runtime.host import Host, current_host, ensure_host
assert current_host() == Host("cpu", "gloo")
assert ensure_host() == Host("cpu", "gloo")
import megatron.core.tensor_parallel.mappings as mappings
names = lambda: [torch.zeros, torch.Tensor.to, torch.Tensor.cuda, torch.cuda.Stream,
                 mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim]
once = names()
assert ensure_host() == Host("cpu", "gloo")
assert all(a is b for a, b in zip(once, names(), strict=True)), "wrapped twice"
assert not torch.cuda.is_available()
for tensor in (
    torch.zeros(3, device="cuda"),
    torch.zeros(3, device=torch.device("cuda", 0)),
    torch.empty(3, pin_memory=True),
    torch.ones(3).new_zeros(3, device="cuda"),
    torch.ones(3).to("cuda"),
    torch.ones(3).to(device="cuda:0", dtype=torch.float64),
    torch.ones(3).cuda(),
):
    assert tensor.device.type == "cpu"
assert torch.ones(3).to(device="cuda", dtype=torch.float64).dtype == torch.float64
assert torch.ones(3).to(torch.float64).dtype == torch.float64
torch.cuda.manual_seed(5)
state = torch.cuda.get_rng_state()
first = torch.rand(4)
torch.cuda.set_rng_state(state)
assert torch.equal(first, torch.rand(4))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
