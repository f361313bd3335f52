"""What Megatron's FSDP keeps on a rank, against the storages of real ranks, byte by byte."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from nemo_megacpp.cli import read_arguments
from nemo_megacpp.contract.fsdp_memory import (
    FsdpMemory,
    fsdp_memory,
    job_buffers,
    largest_fsdp_memory,
)
from nemo_megacpp.core.fsdp import STRATEGIES, problem_with_fsdp
from nemo_megacpp.errors import UserError
from nemo_megacpp.formulas.sizes import Job
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof import core_run
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_reader import StepReader
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.workers import WorkerPool

pytestmark = pytest.mark.skipif(
    problem_with_fsdp() is not None, reason=f"FSDP: {problem_with_fsdp()}"
)


def _bytes(tensors: Iterable[Any], but: Iterable[Any] = ()) -> int:
    """Return the bytes of the storages of tensors, each counted once."""
    known = {_local(t).untyped_storage().data_ptr() for t in but}
    storages = (_local(t).untyped_storage() for t in tensors if t is not None)
    sizes = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in known}
    return sum(sizes.values())


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class _Measure(StepReader):
    """Measures after the last step, instead of gathering."""

    def before_step(self, step: int) -> None:
        pass

    def finish(self) -> None:
        buffer = self._wrapped[0].param_and_grad_buffer
        groups = buffer.parameter_groups
        weights = [group.model_weight_buffer.data for group in groups]
        main = [group.main_weight_buffer.data for group in groups]
        gradients = [group.main_grad_buffer.data for group in groups]
        stepped = [parameter for _, parameter in buffer.optimizer_named_parameters]
        state = self._optimizer.optimizer.state.values()
        # After a step FSDP gathers parameters ahead, for the next.
        gathered = [bucket.data for bucket in buffer.weight_alloc.buckets.values()]
        self.kept = FsdpMemory(
            _bytes([*weights, *buffer.params], but=[*main, *gathered]),
            _bytes([*gradients, *(parameter.grad for parameter in stepped)]),
            _bytes([*main, *stepped]),
            _bytes(value for values in state for value in values.values()),
        )


def _keep(spec: StepSpec, layout: ParallelLayout) -> tuple[int, int, FsdpMemory]:
    """Take a step; return the rank's places in its two groups, and what it keeps."""
    reader = _Measure(spec)
    trainee = core_run._Trainee.prepare(spec, layout, reader)
    trainee.begin(reader)
    trainee.train(reader)
    index = trainee.wrapped[0].param_and_grad_buffer.dist_index
    groups = [index.get_fsdp_group(is_expert_parallel=expert) for expert in (False, True)]
    dense, expert = (0 if group is None else group.rank() for group in groups)
    return dense, expert, reader.kept


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("dtype", "layout", "bucket"),
    [
        ("float32", "tp=2,etp=1,ep=2,world=4", None),
        ("bfloat16", "tp=2,world=4", 1000),
    ],
)
def test_every_strategy(
    ranks: WorkerPool, strategy: str, dtype: Any, layout: str, bucket: int | None
) -> None:
    """Of all families at TP=2 x FSDP=2, on every rank; with ETP=1 and EP=2; in small buckets."""
    ddp: dict[str, Any] = {"use_megatron_fsdp": True, "data_parallel_sharding_strategy": strategy}
    if bucket is not None:
        ddp["bucket_size"] = bucket
    if dtype == "bfloat16":
        ddp["megatron_fsdp_main_grads_dtype"] = torch.float32
    place, model = ParallelLayout.parse(layout), tiny_model("AEMRF")
    spec = StepSpec(model, dtype=dtype, global_batch_size=4, ddp=ddp)
    job = Job(
        model,
        place,
        1,
        4,
        "bf16" if dtype == "bfloat16" else "fp32",
        use_distributed_optimizer=True,
        kernels="torch",
    )
    buffers = job_buffers(job, strategy, bucket)
    kept = ranks.run(place.world, _keep, spec, place)
    planned = [fsdp_memory(job, strategy, buffers, dense, expert) for dense, expert, _ in kept]
    assert planned == [memory for _, _, memory in kept]
    if bucket is None:
        # Of dense and of expert parameters the most, which two ranks may keep.
        most = max(memory.total for memory in planned)
        assert most <= largest_fsdp_memory(job, strategy).total <= most * 1.001


def test_each_strategy_shards_one_thing_more() -> None:
    """Of 16 ranks; what is sharded is a sixteenth, within the padding."""
    job = Job(tiny_model("AMR"), ParallelLayout.parse("world=16"), 1, 16)
    optim, grads, params = (largest_fsdp_memory(job, strategy) for strategy in STRATEGIES)
    assert optim.main_parameters == grads.main_parameters
    assert optim.main_parameters == pytest.approx(optim.gradients / 16, rel=0.1)
    assert grads.gradients == pytest.approx(optim.gradients / 16, rel=0.1)
    assert grads.parameters == pytest.approx(optim.parameters, rel=0.01)
    assert params.parameters == pytest.approx(optim.parameters / 16, rel=0.5)


def _plan(line: str, capsys: Any) -> tuple[int, str]:
    args = read_arguments(["plan", *line.split()])
    return args.run(args), capsys.readouterr().out


def test_the_command(capsys: Any) -> None:
    tiny = "nam56r_tiny --layout tp=2,world=4 --use-megatron-fsdp"
    code, shown = _plan(f"{tiny} --hbm 80GB", capsys)
    assert code == 0
    for part in (*STRATEGIES, "float32 weights", "of the GPU", "Not counted: what FSDP gathers"):
        assert part in shown
    code, shown = _plan(f"{tiny} --data-parallel-sharding-strategy optim_grads --json", capsys)
    document = json.loads(shown)
    assert (code, document["job"]["world_size"]) == (0, 4)
    (kept,) = document["fsdp"].values()
    parts = ("parameters", "gradients", "main_parameters", "moments", "activations")
    assert kept["total"] == sum(kept[name] for name in parts)
    with pytest.raises(UserError, match="with PP=2: Megatron's mesh of FSDP"):
        _plan("nam56r_tiny --layout pp=2,world=4 --use-megatron-fsdp", capsys)
