"""Megatron's FSDP: what it is accepted and refused with."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from nemo_megacpp.config import HybridConfig
from nemo_megacpp.core.fsdp import STRATEGIES, problem_with_fsdp
from nemo_megacpp.errors import UserError
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.settings import script
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
@pytest.mark.parametrize("name", ["save", "load"])
def test_a_script_with_a_checkpoint_of_fsdp(arguments: SimpleNamespace, name: str) -> None:
    setattr(arguments, name, "checkpoints")
    with pytest.raises(UserError, match=f"--use-megatron-fsdp with --{name}: no test has saved"):
        validate_script(HybridConfig(**tiny_model("AEMR")))


def test_a_script_without_fsdp_has_its_strategy_by_default(arguments: SimpleNamespace) -> None:
    vars(arguments).update(use_megatron_fsdp=False, use_custom_fsdp=False)
    validate_script(HybridConfig(**tiny_model("AEMR")))
