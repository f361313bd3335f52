"""What a run saved is loaded by the code of Megatron's script, in another layout, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.folder import find_checkpoint
from nemo_megacpp.checkpoint.manifest import check_manifest
from nemo_megacpp.checkpoint.script_export import export_megatron
from nemo_megacpp.checkpoint.script_state import common_optimizer, script_optimizer
from nemo_megacpp.checkpoint.training_state import save_training_state
from nemo_megacpp.checkpoint.weights import with_prefix
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import Trainee, prepare
from tests.checkpoint.script_checkpoint import load_as_script, save_as_nemo

ROWS = 2
SAVED_IN = "tp=2,etp=1"
SCHEDULE = {
    **{"max_lr": 1e-2, "min_lr": 1e-3, "num_steps": 2, "lr_decay_style": "cosine"},
    **{"lr_warmup_steps": 1, "lr_decay_steps": 10},
}
"""As a run saves it."""


def _spec(pattern: str, dtype: str, sharded: bool = False) -> StepSpec:
    return StepSpec(
        tiny_model(pattern),
        dtype=dtype,  # type: ignore[arg-type]
        global_batch_size=ROWS,
        use_distributed_optimizer=sharded,
    )


def _prepare(spec: StepSpec, degrees: str) -> Trainee:
    trainee = prepare(spec, ParallelLayout.parse(degrees))
    for group in trainee.optimizer.param_groups:
        group["min_lr"] = SCHEDULE["min_lr"]
    return trainee


def _train(spec: StepSpec, folder: str) -> None:
    """Take two steps; save them as a run does."""
    trainee = _prepare(spec, SAVED_IN)
    for _ in range(SCHEDULE["num_steps"]):  # type: ignore[call-overload]
        trainee.forward_backward()
        trainee.optimizer.step()
    save_as_nemo(trainee, folder, SAVED_IN, SCHEDULE)


def _resume(spec: StepSpec, degrees: str, folder: str, out: str) -> tuple[dict[str, Any], float]:
    """Load as the script does; save what was loaded, and return its arguments and learning rate."""
    trainee = _prepare(spec, degrees)
    scheduler = OptimizerParamScheduler(
        trainee.optimizer,
        **{"init_lr": 0.0, "max_lr": 1e-2, "min_lr": 1e-3, "lr_decay_style": "cosine"},
        **{"lr_warmup_steps": ROWS, "lr_decay_steps": 10 * ROWS},
        **{"start_wd": 0.01, "end_wd": 0.01, "wd_incr_steps": 20, "wd_incr_style": "constant"},
        use_checkpoint_opt_param_scheduler=False,  # then it compares
    )
    args = load_as_script(trainee, folder, scheduler)
    save_training_state(trainee.chunks, trainee.optimizer, out)
    return vars(args), trainee.optimizer.param_groups[0]["lr"]


@pytest.fixture(scope="module")
def run(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a float32 run with the distributed optimizer; only read it."""
    folder = tmp_path_factory.mktemp("run") / "step=2"
    ranks.run(2, _train, _spec("AEMR", "float32", sharded=True), str(folder))
    return folder


def _hold(ranks: WorkerPool, run: Path, folder: Path, spec: StepSpec) -> None:
    exported = export_megatron(run, folder / "script")
    assert find_checkpoint(folder / "script") == exported.directory == _place(folder)
    assert check_manifest(exported.directory).endswith("contents verified")
    again = str(folder / "again")
    args, rate = ranks.run(2, _resume, spec, "pp=2", str(exported.directory), again)[0]
    assert (args["consumed_train_samples"], args["no_save_rng"]) == (2 * ROWS, True)
    # After two steps of ten, one of them of warm-up.
    assert rate == pytest.approx(1e-3 + 9e-3 * (1 + torch.cos(torch.tensor(torch.pi / 9))) / 2)
    saved, found = CheckpointContent(run), CheckpointContent(folder / "again")
    names = {
        name: with_prefix(name, "module.", "")
        for name in saved.tensors
        if not name.startswith("random_state")
    }
    assert {*names.values()} == found.tensors.keys()
    assert exported.tensors + exported.optimizer_tensors == len(names)
    different = [
        name
        for name, new in names.items()
        if not torch.equal(saved.read_tensor(name), found.read_tensor(new))
    ]
    assert different == []
    assert found.common()["optimizer"]["step"] == 2


def _place(folder: Path) -> Path:
    return folder / "script" / "iter_0000002"


def test_weights_moments_and_place_are_kept(ranks: WorkerPool, run: Path, tmp_path: Path) -> None:
    _hold(ranks, run, tmp_path, _spec("AEMR", "float32"))


def test_master_weights_are_kept(ranks: WorkerPool, tmp_path: Path) -> None:
    spec = _spec("AEAE", "bfloat16")  # without float32 parameters, experts on both stages
    ranks.run(2, _train, spec, str(tmp_path / "step=2"))
    _hold(ranks, tmp_path / "step=2", tmp_path, spec)


def test_of_a_mixed_model_only_weights_are_exported(ranks: WorkerPool, tmp_path: Path) -> None:
    """In bfloat16 the decays of M and R have no master weights, and Megatron confuses them."""
    ranks.run(2, _train, _spec("AEMR", "bfloat16"), str(tmp_path / "step=2"))
    with pytest.raises(UserError, match=r"float32 parameters, such as .*--weights-only exports"):
        export_megatron(tmp_path / "step=2", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    exported = export_megatron(tmp_path / "step=2", tmp_path / "out", weights_only=True)
    found, saved = CheckpointContent(exported.directory), CheckpointContent(tmp_path / "step=2")
    assert found.tensors.keys() == saved.model_tensors.keys()
    common = found.common()
    assert common["args"].no_save_optim
    assert "optimizer" not in common


def test_what_the_script_cannot_resume_is_refused(run: Path, tmp_path: Path) -> None:
    def changed(name: str, **common: Any) -> Path:
        path = Path(shutil.copytree(run, tmp_path / name))
        file = path / "weights" / "common.pt"
        torch.save({**torch.load(file), **common}, file)
        return path

    def refusal(path: Path) -> str:
        with pytest.raises(UserError) as refused:
            export_megatron(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(refused.value)

    other = changed("other batch", HybridDataModule={"consumed_samples": 5})
    assert "has read 5 rows in 2 steps: global_batch_size was changed" in refusal(other)
    silent = changed("silent", HybridDataModule={})
    assert "does not say how many steps and rows" in refusal(silent)
    form = {"chained_optim_avoid_prefix": True}
    assert "has the form of Megatron's script already" in refusal(
        changed("script", content_metadata=form)
    )
    sharded = changed("sharded", content_metadata={"distrib_optim_sharding_type": "dp_reshardable"})
    assert "in Megatron's format (dp_reshardable" in refusal(sharded)
    (silent / "nemo_megacpp.json").unlink()
    assert "was not saved by a run of this package" in refusal(silent)


def test_the_step_is_where_each_optimizer_reads_it() -> None:
    torchs = {"lr": 1.0, "is_expert_parallel": False, "foreach": None}
    common = {"step": 3, "param_groups": [torchs]}
    assert common_optimizer(script_optimizer(common, masters=False)) == common
    fused = {"lr": 1.0, "is_expert_parallel": True, "bias_correction": True}
    common = {"step": 3, "param_groups": [{**fused, "is_expert_parallel": False}, fused]}
    found = script_optimizer(common, masters=True)
    assert [*found] == [0, 1]
    assert found[1]["optimizer"] == {"state": {}, "param_groups": [{**fused, "step": 3}]}
    assert common_optimizer(found)["step"] == 3
