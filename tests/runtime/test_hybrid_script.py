"""A recipe on Megatron's own trainer without a GPU: trained, saved, resumed in another layout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.training.argument_utils", reason="not in the wheel until 0.18")

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.megatron_args.argument_list import megatron_arguments
from nemo_megacpp.megatron_args.dialect import choose
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.views import model_settings
from tests.runtime.hybrid_script import name_of

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script runs untouched"),
]
SCRIPT = Path(__file__).with_name("hybrid_script.py")
SETTINGS = (
    *("seq_length=32", "vocab_size=384", "global_batch_size=4", "micro_batch_size=1"),
    *("max_steps=4", "save_interval=2", "log_interval=1", "warmup_steps=1", "lr_warmup_init=0"),
    *("limit_val_batches=1", "tensorboard=false", "use_distributed_optimizer=false"),
)
_STEP = re.compile(r"iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+) ")
_OTHERS = {
    # Functions, or what the script derives from the layout.
    *("init_method", "output_layer_init_method", "embedding_init_method", "pipeline_dtype"),
    *("tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"),
    # How it runs its pipeline and names its backend.
    *("cp_comm_type", "transformer_impl", "overlap_p2p_comm", "batch_p2p_comm"),
    *("deallocate_pipeline_outputs", "inference_sampling_seed"),
}


def _run(
    folder: Path, *settings: str, ranks: int = 2, saves: bool = True, more: tuple[str, ...] = ()
) -> dict[int, tuple[float, float]]:
    """Run the recipe; return loss and gradient norm of each step that was logged."""
    recipe = resolve("nam56r_tiny", (*SETTINGS, *settings))
    words, _ = megatron_arguments(recipe, choose(None)[0], str(folder), "cpu")
    if not saves:
        at = words.index("--save")
        del words[at : at + 2]
    words += more
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "nemo_megacpp.runtime", str(SCRIPT), *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    found = [_STEP.search(line) for line in done.stdout.splitlines()]
    return {int(step[1]): (float(step[2]), float(step[3])) for step in found if step}


def test_a_recipe_is_trained_saved_and_resumed(tmp_path: Path) -> None:
    """TP=2, and from its second step on PP=2 with two virtual stages."""
    steps = _run(tmp_path)
    assert sorted(steps) == [1, 2, 3, 4]
    fields = json.loads((tmp_path / "fields.json").read_text())
    meant = HybridConfig(**model_settings(resolve("nam56r_tiny", SETTINGS), "cpu"))
    named = {name: name_of(getattr(meant, name)) for name in fields}
    assert {n for n in fields if fields[n] != named[n]} <= _OTHERS
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = _run(tmp_path, "resume=auto", "tp=1", "pp=2", "vpp=2")
    assert sorted(resumed) == [3, 4]
    assert resumed[3] == pytest.approx(steps[3], rel=1e-5, abs=1e-3)
    # Megatron prints the first step after a start at once, and averages it with the second.
    mean = (steps[3][0] + steps[4][0]) / 2
    assert resumed[4] == pytest.approx((mean, steps[4][1]), rel=1e-5, abs=1e-3)


def test_prediction_depths_are_trained_saved_and_resumed(tmp_path: Path) -> None:
    """With a depth of an R block and experts; the loss that is shown is the decoder's."""
    prediction = ("pattern=AERE/RE", "num_layers=4", "mtp_loss_scaling_factor=0.5")
    steps = _run(tmp_path, *prediction)
    assert sorted(steps) == [1, 2, 3, 4]
    fields = json.loads((tmp_path / "fields.json").read_text())
    assert (fields["mtp_num_layers"], fields["mtp_loss_scaling_factor"]) == ("1", "0.5")
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = _run(tmp_path, *prediction, "resume=auto", "tp=1", "pp=2")
    assert sorted(resumed) == [3, 4]
    assert resumed[3] == pytest.approx(steps[3], rel=1e-5, abs=1e-3)


_FSDP = (
    *("--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor"),
    *("--data-parallel-sharding-strategy", "optim_grads_params"),
)
"""Megatron refuses this format of checkpoints unless it trains with its FSDP."""


def test_fsdp_trains_as_the_usual_wrapper_does(tmp_path: Path) -> None:
    """TP=2 x FSDP=2 through the trainer, against TP=2 without data parallelism."""
    usual = _run(tmp_path, "tp=2", saves=False)
    sharded = _run(tmp_path, "tp=2", ranks=4, saves=False, more=_FSDP)
    assert sorted(usual) == sorted(sharded) == [1, 2, 3, 4]
    for step, (loss, norm) in usual.items():
        assert sharded[step][0] == pytest.approx(loss, rel=1e-6), step
        assert sharded[step][1] == pytest.approx(norm, abs=1e-3), step


@pytest.mark.parametrize("ep", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_fsdp_is_saved_and_resumed(tmp_path: Path, ep: str) -> None:
    """In bf16, from TP=2 x FSDP=2 at TP=2 alone."""
    asked = (*_FSDP, "--megatron-fsdp-main-grads-dtype", "fp32")
    settings = ("pattern=AEMR", "num_layers=4", "tp=2", f"ep={ep}", "precision=bf16")
    steps = _run(tmp_path, *settings, ranks=4, more=asked)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = _run(tmp_path, *settings, "resume=auto", more=asked)
    assert sorted(resumed) == [3, 4]
    assert resumed[3][0] == pytest.approx(steps[3][0], rel=1e-6)
    assert resumed[3][1] == pytest.approx(steps[3][1], abs=1e-3)
