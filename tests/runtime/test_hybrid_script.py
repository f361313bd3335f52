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

from nemo_megacpp.checkpoint.script_export import export_megatron
from nemo_megacpp.config import HybridConfig
from nemo_megacpp.megatron_args.argument_list import megatron_arguments
from nemo_megacpp.megatron_args.dialect import choose
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.views import model_settings
from nemo_megacpp.runtime.workers import WorkerPool
from tests.checkpoint.script_checkpoint import save_as_bridge
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


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[int, tuple[float, float]]]:
    """A run of four steps at TP=2: its folder, and what it logged."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, _run(folder)


def test_a_recipe_is_trained_saved_and_resumed(
    trained: tuple[Path, dict[int, tuple[float, float]]],
) -> None:
    """TP=2, and from its second step on PP=2 with two virtual stages."""
    folder, steps = trained
    assert sorted(steps) == [1, 2, 3, 4]
    fields = json.loads((folder / "fields.json").read_text())
    meant = HybridConfig(**model_settings(resolve("nam56r_tiny", SETTINGS), "cpu"))
    named = {name: name_of(getattr(meant, name)) for name in fields}
    assert {n for n in fields if fields[n] != named[n]} <= _OTHERS
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = _run(folder, "resume=auto", "tp=1", "pp=2", "vpp=2")
    _hold(steps, resumed)


def test_it_resumes_what_a_run_of_ours_has_saved(
    ranks: WorkerPool, trained: tuple[Path, dict[int, tuple[float, float]]], tmp_path: Path
) -> None:
    """Of the same run, which is saved as ours by one rank, and resumed at PP=2."""
    folder, steps = trained
    recipe = resolve("nam56r_tiny", SETTINGS)
    schedule = {"max_lr": recipe.training.lr, "min_lr": recipe.training.min_lr}
    script, ours = folder / "checkpoints" / "iter_0000002", tmp_path / "ours"
    ranks.run(1, save_as_bridge, str(script), str(ours), recipe.model, "tp=1", 2, 8, schedule)
    export_megatron(ours, tmp_path / "again" / "checkpoints")
    _hold(steps, _run(tmp_path / "again", "resume=auto", "tp=1", "pp=2"))


def _hold(steps: dict[int, tuple[float, float]], resumed: dict[int, tuple[float, float]]) -> None:
    """Compare the last two steps of a run with those of one that was resumed."""
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


@pytest.mark.parametrize(
    ("layout", "ranks", "resumed_by"),
    [
        pytest.param(("tp=1",), 2, (2,), id="fsdp2"),
        pytest.param(("tp=2",), 4, (4, 2), id="tp2-fsdp2", marks=pytest.mark.slow),
        pytest.param(("tp=2", "ep=2"), 4, (4, 2), id="tp2-ep2-fsdp2", marks=pytest.mark.slow),
    ],
)
def test_fsdp_is_saved_and_resumed(
    tmp_path: Path, layout: tuple[str, ...], ranks: int, resumed_by: tuple[int, ...]
) -> None:
    """In bf16 by the same ranks; then by fewer, from the same checkpoint."""
    asked = (*_FSDP, "--megatron-fsdp-main-grads-dtype", "fp32")
    settings = ("pattern=AEMRF", "num_layers=5", "precision=bf16", *layout)
    steps = _run(tmp_path, *settings, ranks=ranks, more=asked)
    newest = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    # Of step 4 a resumed run logs the mean loss of both steps.
    meant = {3: steps[3], 4: ((steps[3][0] + steps[4][0]) / 2, steps[4][1])}
    for few in resumed_by:
        newest.write_text("2")
        resumed = _run(tmp_path, *settings, "resume=auto", ranks=few, more=asked)
        assert sorted(resumed) == [3, 4]
        # With fewer data-parallel ranks bf16 rounds the gradients of step 3 elsewhere.
        tolerance = {3: 1e-6, 4: 1e-6 if few == ranks else 5e-5}
        for step, (loss, norm) in meant.items():
            assert resumed[step][0] == pytest.approx(loss, rel=tolerance[step]), (few, step)
            assert resumed[step][1] == pytest.approx(norm, abs=1e-3), (few, step)
