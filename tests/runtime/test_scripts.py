"""Somebody else's training script, which knows only CUDA and NCCL, on the no-GPU host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_megacpp.errors import UserError
from nemo_megacpp.runtime.__main__ import run_script

SCRIPT = """
import os, sys, torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from beside import SIZE

assert torch.cuda.is_available() and torch.cuda.device_count() == 2
assert torch.cuda.get_device_capability() >= (8, 0)
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
torch.distributed.init_process_group(
    "nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"]))
)
parallel_state.initialize_model_parallel(2)
model_parallel_cuda_manual_seed(1)
config = TransformerConfig(
    num_layers=1, hidden_size=SIZE, num_attention_heads=4, use_cpu_initialization=True,
    tensor_model_parallel_size=2, gradient_accumulation_fusion=False, attention_dropout=0.0,
    hidden_dropout=0.0, bias_dropout_fusion=False, masked_softmax_fusion=False,
)
model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=64, max_sequence_length=8).cuda()
tokens = torch.arange(8, device="cuda").view(1, 8)
mask = torch.ones(1, 1, 8, 8, device="cuda").triu(1).bool()
loss = model(tokens, tokens, mask, labels=tokens).mean()
loss.backward()
torch.cuda.synchronize()
assert torch.cuda.memory_allocated() == 0 and torch.cuda.memory_stats()["anything"] == 0
if torch.distributed.get_rank() == 0:
    grad = sum(p.grad.norm().item() for p in model.parameters())
    print("arguments", sys.argv[1:], "backend", torch.distributed.get_backend(), grad > 0)

from nemo_megacpp.runtime.host import current_host
assert current_host().device == "cpu", "this package is told the truth"
"""


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script runs untouched")
def test_a_cuda_script_trains_on_two_gloo_ranks(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("SIZE = 32\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("-m", "nemo_megacpp.runtime", str(tmp_path / "script.py"), "--lr", "3"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "arguments ['--lr', '3'] backend gloo True" in done.stdout


HELPER = """
import multiprocessing, time
from megatron.core.inference import data_parallel_inference_coordinator
multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True).start()
time.sleep(0.5)
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script runs untouched")
def test_the_end_of_helper_processes_does_not_look_like_a_crash(tmp_path: Path) -> None:
    """Python ends them with SIGTERM, on which Megatron prints a stack."""
    (tmp_path / "script.py").write_text(HELPER)
    done = subprocess.run(
        [sys.executable, "-m", "nemo_megacpp.runtime", str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "most recent call first" not in done.stderr


def test_a_missing_script_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no script .*nowhere\.py"):
        run_script(str(tmp_path / "nowhere.py"))
