"""What Megatron's script saves of optimizer and step is loaded in every layout, bit for bit."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.optimizer_state import validate_optimizer_form
from nemo_megacpp.checkpoint.script_state import (
    common_optimizer,
    consumed_samples,
    validate_script_optimizer,
)
from nemo_megacpp.checkpoint.training_state import load_training_state, save_training_state
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import prepare
from tests.checkpoint.script_checkpoint import save_trainee


def _spec(dtype: str) -> StepSpec:
    pattern = "AEMR" if dtype == "float32" else "AE"  # without float32 parameters
    return StepSpec(tiny_model(pattern), dtype=dtype, global_batch_size=2)  # type: ignore[arg-type]


def _train(dtype: str, folder: str) -> None:
    """Take two steps; save them as the script does, and in the package's form."""
    trainee = prepare(_spec(dtype), ParallelLayout.parse("tp=2,etp=1"))
    for _ in range(2):
        trainee.forward_backward()
        trainee.optimizer.step()
    save_trainee(trainee, f"{folder}/script", step=2, samples=4)
    save_training_state(trainee.chunks, trainee.optimizer, f"{folder}/ours")


def _resume(dtype: str, degrees: str, folder: str) -> None:
    trainee = prepare(_spec(dtype), ParallelLayout.parse(degrees))
    load_training_state(trainee.chunks, trainee.optimizer, f"{folder}/script/iter_0000002")
    save_training_state(trainee.chunks, trainee.optimizer, f"{folder}/{degrees}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_masters_and_step_are_kept(ranks: WorkerPool, tmp_path: Path, dtype: str) -> None:
    ranks.run(2, _train, dtype, str(tmp_path))
    script = CheckpointContent(tmp_path / "script")
    assert script.step == 2
    assert consumed_samples(script.common()) == 4
    validate_script_optimizer(script.directory, script.tensors)
    expected = CheckpointContent(tmp_path / "ours")
    names = [name for name in expected.tensors if name.startswith("optimizer.")]
    assert any("fp32_param" in name for name in names) == (dtype == "bfloat16")
    ranks.run(2, _resume, dtype, "pp=2", str(tmp_path))
    found = CheckpointContent(tmp_path / "pp=2")
    assert found.tensors.keys() == expected.tensors.keys()
    different = [
        name
        for name in expected.tensors
        if not torch.equal(found.read_tensor(name), expected.read_tensor(name))
    ]
    assert different == []
    assert found.common()["optimizer"]["step"] == 2


def test_the_forms_of_an_optimizer() -> None:
    """Of one optimizer, two, one of bfloat16 parameters; the package's own, in NeMo's list."""
    group, other = {"lr": 1.0}, {"lr": 2.0}
    plain = {"state": {"common_step": 3}, "param_groups": [group]}
    assert common_optimizer(plain) == {"step": 3, "param_groups": [group]}
    low = {"optimizer": {**plain, "param_groups": [other]}, "fp32_from_fp16_params": []}
    both = {"step": 3, "param_groups": [group, other]}
    assert common_optimizer({0: plain, 1: low}) == both
    assert common_optimizer([both]) == both
    with pytest.raises(UserError, match="does not say its step"):
        common_optimizer({"param_groups": [group], "state": {}})
    assert consumed_samples({"args": Namespace()}) is None


def test_confused_states_are_refused() -> None:
    moments = [f"optimizer.state.exp_avg.{name}" for name in ("weight", "mixer.A_log")]
    masters = [f"optimizer.state.fp32_param.{name}" for name in ("weight", "mixer.A_log")]
    validate_script_optimizer(Path("there"), moments)
    validate_script_optimizer(Path("there"), [*moments, *masters])
    with pytest.raises(UserError, match=r"float32 parameters, such as mixer\.A_log"):
        validate_script_optimizer(Path("there"), [*moments, masters[0]])


def test_what_only_its_own_layout_loads_is_refused() -> None:
    form = {"chained_optim_avoid_prefix": True}
    validate_optimizer_form(form)
    for kind in ("dp_reshardable", "fully_reshardable"):
        with pytest.raises(UserError, match=rf"in Megatron's format \({kind}"):
            validate_optimizer_form({**form, "distrib_optim_sharding_type": kind})
    with pytest.raises(UserError, match="without the distributed optimizer"):
        validate_optimizer_form({})
