"""Megatron's FSDP: what it is accepted and refused with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed import checkpoint as dcp

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.core.fsdp import STRATEGIES, problem_with_fsdp
from nemo_megacpp.errors import UserError
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.settings import fsdp, fsdp_checkpoint, script
from nemo_megacpp.settings.combinations import training_violations
from nemo_megacpp.settings.fsdp import fsdp_violations
from nemo_megacpp.settings.script import validate_script

_PROBLEM = problem_with_fsdp()
needs_fsdp = pytest.mark.skipif(_PROBLEM is not None, reason=f"FSDP: {_PROBLEM}")


def _wrapper(**changes: Any) -> DistributedDataParallelConfig:
    asked: dict[str, Any] = {
        "use_megatron_fsdp": True,
        "data_parallel_sharding_strategy": "optim_grads_params",
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "grad_reduce_in_fp32": True,
    }
    return DistributedDataParallelConfig(**{**asked, **changes})


@needs_fsdp
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accepted(strategy: str) -> None:
    ddp = _wrapper(data_parallel_sharding_strategy=strategy)
    assert not list(training_violations(HybridConfig(**tiny_model("AEMR")), ddp, None))


@pytest.mark.skipif(_PROBLEM is None, reason="this release has FSDP in the form that is proved")
def test_refused_on_the_release_that_no_proof_can_run() -> None:
    (message,) = fsdp_violations(HybridConfig(**tiny_model("AEMR")), _wrapper())
    assert message.startswith("DistributedDataParallelConfig.use_megatron_fsdp=True: Megatron-Core")


@needs_fsdp
@pytest.mark.parametrize(
    ("model", "ddp", "message"),
    [
        ({}, {"data_parallel_sharding_strategy": "no_shard"}, "shards nothing; .* 'optim_grads'"),
        ({"pipeline_model_parallel_size": 2}, {}, r"with PP=2: .*Legal: PP=1\."),
        ({}, {"use_distributed_optimizer": False}, "use_distributed_optimizer=False: FSDP's"),
        ({"bf16": True}, {}, r"main_grads_dtype=None: in bf16 .*Legal: torch\.float32"),
        ({}, {"average_in_collective": True}, "average_in_collective=True: no case"),
        ({}, {"nccl_ub": True}, "nccl_ub=True: no case"),
        ({}, {"delay_wgrad_compute": True}, "delay_wgrad_compute=True: no case"),
    ],
)
def test_refused_together(model: dict[str, Any], ddp: dict[str, Any], message: str) -> None:
    fields = {"hybrid_pattern": "AE|MR", **model}
    if fields.get("pipeline_model_parallel_size"):
        fields["pipeline_dtype"] = torch.float32
    config = HybridConfig(**{**tiny_model("AEMR"), **fields})
    wrapper = _wrapper()
    vars(wrapper).update(ddp)
    with pytest.raises(UserError, match=message):
        raise UserError(" ".join(fsdp_violations(config, wrapper)))


@needs_fsdp
@pytest.mark.parametrize(
    ("pattern", "refused"),
    [
        (SimpleNamespace(letters="AEMR"), False),
        (SimpleNamespace(letters="AEYR"), True),
        (None, True),  # of a script: its model does not say which of them it has
    ],
)
def test_a_family_of_a_user_is_refused_where_the_model_has_it(
    monkeypatch: pytest.MonkeyPatch, pattern: SimpleNamespace | None, refused: bool
) -> None:
    monkeypatch.setattr(fsdp, "added", lambda: (SimpleNamespace(letter="Y"),))
    config = HybridConfig(**tiny_model("AEMR"))
    monkeypatch.setattr(HybridConfig, "pattern", pattern)
    messages = " ".join(fsdp_violations(config, _wrapper()))
    assert ("the families Y of family_modules" in messages) == refused


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Be a script with these arguments."""
    args = SimpleNamespace(
        use_megatron_fsdp=True,
        use_custom_fsdp=True,  # Megatron's argument check sets it
        data_parallel_sharding_strategy="optim_grads_params",
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        accumulate_allreduce_grads_in_fp32=True,
    )
    monkeypatch.setattr(script, "_arguments", lambda: args)
    yield args


@needs_fsdp
def test_a_script_with_fsdp(arguments: SimpleNamespace) -> None:
    config = HybridConfig(**tiny_model("AEMR"))
    validate_script(config)
    arguments.fsdp_double_buffer = True
    with pytest.raises(UserError, match="fsdp_double_buffer=True: Megatron's FSDP alone reads it"):
        validate_script(config)


@needs_fsdp
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save": "runs"}, "with --save in float32: .*Train in bf16"),
        ({"save": "runs", "load": "runs"}, "with --save and --load in float32"),
        ({"pretrained_checkpoint": "runs"}, "with --pretrained-checkpoint: no case"),
        ({"save": "runs", "async_save": True}, "--save and --async-save: no case"),
        ({"save": "runs", "no_save_optim": True}, "--no-save-optim: no case has saved the weights"),
        ({"load": "runs", "finetune": True}, "--load and --finetune: no case starts from"),
        ({"load": "runs", "strict_fsdp_dtensor_load": False}, "checkpoint lacks would stay random"),
        (
            {"save": "runs", "data_parallel_sharding_strategy": "optim"},
            "strategy optim: no case has saved a checkpoint with it. Legal: optim_grads_params",
        ),
    ],
)
def test_a_script_with_a_checkpoint_of_fsdp(
    arguments: SimpleNamespace, changes: dict[str, Any], message: str
) -> None:
    vars(arguments).update(changes)
    with pytest.raises(UserError, match=message):
        validate_script(HybridConfig(**tiny_model("AEMR")))


@needs_fsdp
def test_a_checkpoint_of_fsdp_needs_a_state_of_every_parameter(
    arguments: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DistributedOptimizer, "sharded_param_state_fsdp_dtensor", lambda _: {})
    arguments.save = "runs"
    with pytest.raises(UserError, match="with --save: the Adam of torch has no state of"):
        validate_script(HybridConfig(**tiny_model("AEMR")))


@needs_fsdp
def test_a_checkpoint_of_fsdp_has_its_degrees(
    arguments: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fsdp_checkpoint, "problem_with_saving", lambda: None)
    config = HybridConfig(**tiny_model("AEMR"), bf16=True)
    degrees = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 1}
    vars(arguments).update(degrees, load=str(tmp_path), save=str(tmp_path))
    vars(arguments).update(bf16=True, megatron_fsdp_main_grads_dtype=torch.float32)
    validate_script(config)  # nothing is there to load yet
    folder = tmp_path / "iter_0000002"
    dcp.save({"args": SimpleNamespace(**degrees)}, checkpoint_id=folder, no_dist=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    validate_script(config)
    arguments.tensor_model_parallel_size = 4
    with pytest.raises(UserError, match=r"saved with TP=2, at TP=4: .*Legal: TP=2; the number"):
        validate_script(config)
    vars(arguments).update(tensor_model_parallel_size=2, expert_model_parallel_size=2)
    with pytest.raises(UserError, match="at EP=2: no case has loaded one at another EP"):
        validate_script(config)
    arguments.ckpt_step = 3
    validate_script(config)  # Megatron says that step 3 is not there


@needs_fsdp
@pytest.mark.parametrize("state", [{"model": torch.zeros(3)}, None], ids=["torch_dist", "torch"])
def test_a_checkpoint_of_the_usual_wrapper_is_not_loaded(
    arguments: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    state: dict[str, Any] | None,
) -> None:
    monkeypatch.setattr(fsdp_checkpoint, "problem_with_saving", lambda: None)
    config = HybridConfig(**tiny_model("AEMR"), bf16=True)
    vars(arguments).update(load=str(tmp_path), bf16=True)
    arguments.megatron_fsdp_main_grads_dtype = torch.float32
    folder = tmp_path / "iter_0000002"
    folder.mkdir()
    if state is not None:
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    with pytest.raises(UserError, match="iter_0000002, which is no checkpoint of Megatron's FSDP"):
        validate_script(config)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("two")
    with pytest.raises(UserError, match="names no iteration: 'two'"):
        validate_script(config)


def test_a_script_without_fsdp_has_its_strategy_by_default(arguments: SimpleNamespace) -> None:
    vars(arguments).update(use_megatron_fsdp=False, use_custom_fsdp=False)
    validate_script(HybridConfig(**tiny_model("AEMR")))
