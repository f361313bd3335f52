"""A run that was saved and resumed is the run that was never stopped, bit for bit."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_megacpp.checkpoint.export import export
from nemo_megacpp.checkpoint.identity import read_identity
from nemo_megacpp.checkpoint.manifest import check_manifest
from nemo_megacpp.checkpoint.rewrite import import_safetensors
from nemo_megacpp.data.prepare import prepare
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.runs.curves import Curve, read_curve
from nemo_megacpp.runtime.workers import WorkerPool
from tests.checkpoint.script_checkpoint import save_as_bridge, save_as_script

STEPS = 4
SMALL = {
    "pattern": "AEMR",
    "depth": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "moe_router_topk": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_state_dim": 8,
    "mamba_num_groups": 2,
    "m2rnn_num_heads": 4,
    "m2rnn_key_head_dim": 8,
    "m2rnn_value_head_dim": 8,
    "seq_length": 32,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "max_steps": STEPS,
    "warmup_steps": 2,
    "save_interval": 2,
    "val_check_interval": 3,
    "limit_val_batches": 2,
    "etp": 1,
}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}

Train = Callable[..., Path]


@pytest.fixture
def train(ranks: WorkerPool, small_data: PreparedData, tmp_path: Path) -> Train:
    """Return a function that trains on two ranks; a run is named by its folder."""
    from tests.nemo import nemo_ranks

    def run(name: str, *, task: str = "run_train", **settings: Any) -> Path:
        given = {**SMALL, "data": small_data.root, **settings, "run_dir": tmp_path / name}
        overrides = [f"{key}={value}" for key, value in given.items()]
        ranks.run(2, getattr(nemo_ranks, task), _free_port(), overrides)
        return tmp_path / name

    return run


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step={step}"


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint, whole, in one process."""
    reader = dcp.FileSystemReader(str(checkpoint / "weights"))
    saved = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in saved.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def _what_goes_on(checkpoint: Path) -> dict[str, Any]:
    """Return what all ranks share: optimizer settings and step, scheduler, consumed samples."""
    common = dist_checkpointing.load_common_state_dict(str(checkpoint / "weights"))
    kept = ("global_step", "optimizer", "lr_schedulers", "HybridDataModule")
    return {key: common[key] for key in kept}


def _same_end(one: Path, other: Path, step: int = STEPS) -> None:
    """Both runs end alike: weights, moments, master weights, random states, and what is shared."""
    a, b = _tensors(_checkpoint(one, step)), _tensors(_checkpoint(other, step))
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert _what_goes_on(_checkpoint(one, step)) == _what_goes_on(_checkpoint(other, step))


def _records(run: Path) -> dict[int, dict[str, Any]]:
    """Return what each step computed, without what its host decides."""
    host = ("tokens_per_second", "tflops_per_rank", "mfu", "memory", "memory_added", "seconds")
    host += ("seconds_fastest", "seconds_slowest")
    steps = read_curve(run).steps
    return {
        step: {key: value for key, value in record.items() if key not in host}
        for step, record in steps.items()
    }


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"tp": 2}, id="TP with SP", marks=pytest.mark.slow),
        pytest.param(
            {"tp": 1, "world_size": 2, "use_distributed_optimizer": True, "precision": "bf16"},
            id="distributed optimizer, bf16",
        ),
        pytest.param(
            {"tp": 1, "cp": 2, "ep": 2, "mode": "mamba3"},
            id="CP, EP, Mamba-3",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"tp": 1, "pp": 2, "vpp": 2, "precision": "bf16"},
            id="PP, VPP, bf16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_same_layout_is_exact(train: Train, settings: dict[str, Any]) -> None:
    """With dropout on. The validation between the steps is no part of the training."""
    at_once = train("at_once", **settings, **DROPOUT)
    resumed = train("resumed", **settings, **DROPOUT, resume=_checkpoint(at_once, 2))
    first, second = _records(at_once), _records(resumed)
    assert (list(first), list(second)) == ([1, 2, 3, 4], [3, 4])
    assert second == {step: first[step] for step in (3, 4)}
    assert read_curve(at_once).heldout == read_curve(resumed).heldout
    assert list(read_curve(resumed).heldout) == [3]
    _same_end(at_once, resumed)
    moments = [
        value for key, value in _tensors(_checkpoint(resumed, STEPS)).items() if "exp_" in key
    ]
    assert moments and all(value.any() for value in moments)


@pytest.mark.slow
def test_stopped_twice_is_never_stopped(train: Train) -> None:
    """Saved wherever the run was stopped, in one folder, with the random state of the end."""
    settings = {"tp": 2, **DROPOUT, "save_interval": 1000}
    at_once = train("at_once", **settings)
    train("parts", **settings, stop_after=1)
    train("parts", **settings, stop_after=3, resume="auto")
    parts = train("parts", **settings, resume="auto")
    assert _records(parts) == _records(at_once)
    _same_end(at_once, parts)
    assert _what_goes_on(_checkpoint(parts, STEPS))["HybridDataModule"] == {
        "consumed_samples": STEPS * SMALL["global_batch_size"]  # type: ignore[operator]
    }
    # The generators are part of it: dropout that starts anew is another run.
    step_one = _checkpoint(parts, 1)
    other = train("other", task="run_train_without_random_state", **settings, resume=step_one)
    assert _records(other)[2]["loss"] != _records(at_once)[2]["loss"]


def _damage(checkpoint: Path) -> None:
    """Flip a bit: names and sizes stay as they are."""
    shard = sorted((checkpoint / "weights").glob("*.distcp"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.slow
def test_every_rank_skips_a_damaged_checkpoint(train: Train) -> None:
    """Only rank 0 reads the contents; the others would take the newest."""
    at_once = train("at_once", tp=2)
    parts = train("parts", tp=2, stop_after=3)
    _damage(_checkpoint(parts, 3))
    train("parts", tp=2, resume="auto")
    assert _records(parts) == _records(at_once)
    _same_end(at_once, parts)
    names = {path.name for path in (parts / "checkpoints").iterdir()}
    assert names == {"step=2", "step=3.damaged", "step=4"}


@pytest.mark.slow
def test_other_layouts_follow_within_rounding(train: Train) -> None:
    """Losses, gradient norms and held-out losses of the steps that follow, float32, dropout off."""
    at_once = train("at_once", tp=2)
    expected = read_curve(at_once)
    for name, settings in {
        "pp": {"tp": 1, "pp": 2},
        "sharded": {"tp": 1, "world_size": 2, "use_distributed_optimizer": True},
    }.items():
        run = train(name, **settings, resume=_checkpoint(at_once, 2))
        _close(read_curve(run), expected)


def test_the_schedule_continues_in_another_layout(train: Train) -> None:
    """Step by step; a resumed run that changes settings of the optimizer trains with its own."""
    settings = {
        **{"lr_decay_style": "WSD", "lr_wsd_decay_steps": 2, "lr_wsd_decay_style": "linear"},
        **{"warmup_steps": 1, "adam_beta1": 0.8, "adam_eps": 1e-6, "lr": 4e-3, "min_lr": 4e-4},
    }
    at_once = train("at_once", tp=2, **settings)
    rates = [record["lr"] for record in read_curve(at_once).steps.values()]
    assert rates == pytest.approx([4e-3, 4e-3, 2.2e-3, 4e-4]), "of the step that follows"
    other = {"tp": 1, "pp": 2, "resume": _checkpoint(at_once, 2)}
    _close(read_curve(train("pp", **settings, **other)), read_curve(at_once))
    changed = {"adam_beta1": 0.5, "weight_decay": 0.2, "max_steps": 6, "stop_after": 3}
    run = train("changed", **{**settings, **changed, **other})
    assert read_curve(run).steps[3]["lr"] == 4e-3, "the longer run decays later"
    common = dist_checkpointing.load_common_state_dict(str(_checkpoint(run, 3) / "weights"))
    (optimizer,) = common["optimizer"]
    groups = optimizer["param_groups"]
    assert {group["betas"][0] for group in groups} == {0.5}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}


def _close(curve: Curve, expected: Curve, within: float = 1e-5) -> None:
    assert list(curve.steps) == [3, 4]
    for step, record in curve.steps.items():
        assert record["lr"] == expected.steps[step]["lr"]
        for number in ("loss", "grad_norm"):
            assert record[number] == pytest.approx(expected.steps[step][number], rel=within)
    assert curve.heldout == pytest.approx(expected.heldout, rel=within)


def test_a_run_starts_from_weights_alone(train: Train, ranks: WorkerPool, tmp_path: Path) -> None:
    """Exported, imported, and loaded with init_from in another layout, at step 0.

    The import has the names of Megatron's script and does not say its model, as its checkpoints.
    The next step has a learning rate that changes no weight, so what it saves is what was loaded,
    float32 master weights included: a step taken from other masters would show.
    """
    trained = train("trained", tp=2, stop_after=2, save_interval=1, precision="bf16")
    export(_checkpoint(trained, 2), tmp_path / "exported")
    imported, config = tmp_path / "imported", tmp_path / "exported" / "config.json"
    config.write_text(config.read_text().replace('"module."', '""'))
    import_safetensors(
        tmp_path / "exported", imported, lambda _: contextlib.nullcontext(ranks), verify=False
    )
    for file in imported.glob("*.json"):
        file.unlink()
    still = {"lr": "1e-30", "min_lr": 0, "weight_decay": 0, "max_steps": 1, "warmup_steps": 0}
    begun = train(
        "begun",
        **{"tp": 1, "world_size": 2, "use_distributed_optimizer": True, "precision": "bf16"},
        **still,
        init_from=imported,
    )
    wanted = {f"module.{name}": value for name, value in _tensors(imported).items()}
    found = _tensors(_checkpoint(begun, 1))
    assert wanted.keys() <= found.keys()
    different = [
        name
        for name, value in wanted.items()
        if "expert_bias" not in name  # the router moves it after each step
        and not torch.allclose(value, found[name], rtol=0, atol=1e-20)
    ]
    assert different == []
    first = _tensors(_checkpoint(trained, 1))
    name = "module.decoder.final_norm.weight"
    assert not torch.equal(first[name], wanted[name]), "the weights had been trained"
    assert list(_records(begun)) == [1]
    assert _what_goes_on(_checkpoint(begun, 1))["global_step"] == 1


def test_fine_tuning_begins_at_the_beginning(
    train: Train, ranks: WorkerPool, small_data: PreparedData, tmp_path: Path
) -> None:
    """In another layout: on the same data its losses are those of the saved model, on other data
    the run is like any other; optimizer, schedule and order of the data start anew."""
    fixed = {"moe_router_bias_update_rate": 0}
    trained = train("trained", tp=2, **fixed)
    saved = _checkpoint(trained, 2)
    other = {"tp": 1, "pp": 2, "init_from": saved, **fixed}
    still = train("still", **other, lr="1e-30", min_lr=0, weight_decay=0, stop_after=3)
    losses = _losses(still)
    assert losses[3] == pytest.approx(_losses(trained)[3], rel=1e-6), "of the saved model"
    assert losses[1] != pytest.approx(_losses(trained)[1], rel=1e-3), "the weights were trained"
    assert read_curve(still).steps[1]["step"] == 1

    (texts := tmp_path / "texts").mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text("\n".join(f"{n * 7} others" for n in range(300)))
    data = prepare(
        [texts],
        tmp_path / "other",
        tokenizer=small_data.tokenizer_dir,
        held_out=0.3,
        progress=False,
    )
    tuned = train("tuned", **other, data=data.root, save_interval=1)
    rates = [record["lr"] for record in read_curve(tuned).steps.values()]
    assert rates == [record["lr"] for record in read_curve(trained).steps.values()]
    assert _losses(tuned)[1] != pytest.approx(losses[1], rel=1e-3)
    common = _what_goes_on(_checkpoint(tuned, 1))
    assert common["optimizer"][0]["step"] == common["global_step"] == 1
    assert common["HybridDataModule"] == {"consumed_samples": SMALL["global_batch_size"]}
    first = _tensors(_checkpoint(tuned, 1))
    moments = [name for name in first if ".exp_avg." in name]
    assert moments
    for name in moments:  # (1 - beta1) g and (1 - beta2) g² of one gradient: both began at zero
        square = (first[name] / (1 - 0.9)) ** 2 * (1 - 0.95)
        found = first[name.replace(".exp_avg.", ".exp_avg_sq.")]
        torch.testing.assert_close(found, square, rtol=1e-4, atol=1e-20, msg=name)


def test_checkpoints_of_other_programs_are_resumed(
    train: Train, ranks: WorkerPool, tmp_path: Path
) -> None:
    """Of Megatron's script and Bridge: weights, moments, step and the place in the data, as if
    the run had never changed hands."""
    at_once = train("at_once", tp=2)
    identity = read_identity(_checkpoint(at_once, 2))
    assert identity is not None
    samples = 2 * SMALL["global_batch_size"]  # type: ignore[operator]
    script, bridge = tmp_path / "script", tmp_path / "bridge" / "iter_0000002"
    saved, model = str(_checkpoint(at_once, 2)), identity["model"]
    ranks.run(2, save_as_script, saved, str(script), model, "tp=2,etp=1", 2, samples)
    ranks.run(2, save_as_bridge, saved, str(bridge), model, "pp=2", 2, samples)
    wanted = _what_goes_on(_checkpoint(at_once, STEPS))
    for name, start in (("of_script", script), ("of_bridge", bridge)):
        resumed = train(name, tp=1, pp=2, resume=start)
        _close(read_curve(resumed), read_curve(at_once))
        found = _what_goes_on(_checkpoint(resumed, STEPS))
        assert found["HybridDataModule"] == wanted["HybridDataModule"]
        assert found["optimizer"][0]["step"] == found["global_step"] == STEPS
    _load_context(Path(saved))
    from tests.nemo import nemo_ranks

    ranks.run(1, nemo_ranks.load_whole_context, saved, 2)


def _load_context(saved: Path) -> None:
    """NeMo's own restore reads how the objects were constructed."""
    from nemo.lightning.io import load_context

    from nemo_megacpp.nemo.hybrid_gpt import HybridModelConfig

    model = load_context(saved, subpath="model", build=False)
    assert model.config.hybrid_pattern == "AEMR"
    config = load_context(saved, subpath="model.config")
    assert isinstance(config, HybridModelConfig)
    assert config.m2rnn_num_heads == SMALL["m2rnn_num_heads"]
    assert "contents verified" in check_manifest(saved)


def _losses(run: Path) -> dict[int, float]:
    return {step: record["loss"] for step, record in read_curve(run).steps.items()}


def test_nemo_factory_is_exact(ranks: WorkerPool, small_data: PreparedData, tmp_path: Path) -> None:
    """Through the recipe behind ``nemo llm pretrain --factory``, at its own size."""
    from tests.nemo import nemo_ranks

    settings = {
        "max_steps": 2,
        "save_interval": 1,
        "micro_batch_size": 1,
        "global_batch_size": 2,
        "seq_length": 16,
        "data": str(small_data.root),
    }
    at_once, resumed = tmp_path / "at_once", tmp_path / "resumed"
    ranks.run(2, nemo_ranks.run_factory, _free_port(), {**settings, "run_dir": str(at_once)})
    again = {**settings, "run_dir": str(resumed), "resume": str(_checkpoint(at_once, 1))}
    ranks.run(2, nemo_ranks.run_factory, _free_port(), again)
    assert _records(resumed) == {2: _records(at_once)[2]}
    _same_end(at_once, resumed, step=2)
    _damage(_checkpoint(at_once, 2))
    again = {**settings, "run_dir": str(at_once), "resume": "auto"}
    ranks.run(2, nemo_ranks.run_factory, _free_port(), again)
    _same_end(at_once, resumed, step=2)
    assert (at_once / "checkpoints" / "step=2.damaged").is_dir()
