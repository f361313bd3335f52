"""Overrides after a factory: what the run is made of is checked, and is what a checkpoint says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_megacpp.checkpoint.described import actual_layout, actual_model
from nemo_megacpp.config import HybridConfig
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.nemo.actual import (
    tokenizer_of,
    validate_actual,
)
from nemo_megacpp.recipes.catalog import NAM56R_TINY_MODEL
from nemo_megacpp.recipes.recipe import from_mapping


def config_of(**changes: Any) -> HybridConfig:
    return HybridConfig(**{**NAM56R_TINY_MODEL, **changes})


def data_of(**changes: Any) -> SimpleNamespace:
    usual = {"seq_length": 256, "micro_batch_size": 1, "global_batch_size": 8}
    return SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=2048), **{**usual, **changes})


def test_the_layout_is_that_of_the_ranks() -> None:
    config = config_of(
        tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=1
    )
    assert actual_layout(config, 2) == ParallelLayout.parse("tp=2,etp=1")
    assert actual_layout(config, 4) == ParallelLayout.parse("tp=2,etp=1,world=4")


def test_the_model_is_the_one_that_trains() -> None:
    said = actual_model(config_of(add_qkv_bias=True, moe_aux_loss_coeff=0.5), ["moe_router_topk"])
    assert (said["add_qkv_bias"], said["moe_router_topk"]) == (True, 4)
    assert (said["hidden_size"], said["hybrid_pattern"]) == (224, "AEMEAEMEAEMR")
    assert "moe_aux_loss_coeff" not in said, "neither given by a recipe nor a tensor's shape"
    assert HybridConfig(
        **actual_model(config_of(add_qkv_bias=True), NAM56R_TINY_MODEL)
    ).add_qkv_bias


def test_what_fits_is_let_through() -> None:
    validate_actual(ParallelLayout.parse("tp=2,etp=1"), config_of(), data_of(), node=0)


@pytest.mark.parametrize(
    ("layout", "changes", "node", "message"),
    [
        ("tp=1", {"seq_length": 64}, 0, "data.seq_length=64 and model.config.seq_length=256"),
        ("tp=3", {}, 0, r"tp=3,sp=true is illegal .* for \d reasons"),
        ("tp=2,etp=1,world=32", {}, 0, r"global 8, micro 1 × DP 16"),
        ("tp=4,etp=1,world=4", {}, 2, r"TP = 4 does not fit the NVLink domain of 2 GPUs a node"),
        (
            "tp=1",
            {"tokenizer": SimpleNamespace(vocab_size=50257)},
            0,
            "has 50257 tokens and model.config.vocab_size is 2048",
        ),
    ],
)
def test_what_does_not_is_refused(
    layout: str, changes: dict[str, Any], node: int, message: str
) -> None:
    data = data_of()
    vars(data).update(changes)
    with pytest.raises(UserError, match=message):
        validate_actual(ParallelLayout.parse(layout), config_of(), data, node)


def _fake_run(**data: Any) -> SimpleNamespace:
    """A model with its trainer, as Lightning has put them together."""
    places = {"world_size": 1, "num_devices": 1, "num_nodes": 1}
    return SimpleNamespace(
        config=config_of(), trainer=SimpleNamespace(datamodule=data_of(**data), **places)
    )


def test_the_strategy_refuses_before_it_takes_the_model() -> None:
    from nemo_megacpp.nemo.strategy import HybridStrategy

    with pytest.raises(UserError, match=r"data\.seq_length=64 and model\.config\.seq_length=256"):
        HybridStrategy.connect(SimpleNamespace(parallelism=config_of()), _fake_run(seq_length=64))


def test_the_strategy_loads_no_checkpoint_of_another_model(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_megacpp.nemo import strategy

    monkeypatch.setattr(strategy, "guard_load", lambda path, **_: path)  # its scan wants ranks
    other = save(from_mapping({"recipe": "nam56r_tiny", "add_qkv_bias": True}))
    with pytest.raises(UserError, match="add_qkv_bias is True there and False here"):
        strategy.HybridStrategy.load_checkpoint(
            SimpleNamespace(lightning_module=_fake_run()), other
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp": "megatron"}, r"trainer\.strategy\.fsdp='megatron': gradients are"),
        ({"fsdp": "pytorch"}, r"trainer\.strategy\.fsdp='pytorch'"),
        ({"ddp": "pytorch"}, r"trainer\.strategy\.ddp='pytorch'"),
        (
            {"save_ckpt_format": "fsdp_dtensor"},
            r"trainer\.strategy\.save_ckpt_format='fsdp_dtensor'",
        ),
        (
            {"ddp": SimpleNamespace(use_megatron_fsdp=True)},
            r"trainer\.strategy\.ddp\.use_megatron_fsdp=True",
        ),
    ],
)
def test_the_strategy_refuses_other_wrappers(settings: dict[str, Any], message: str) -> None:
    from nemo_megacpp.nemo.strategy import HybridStrategy

    with pytest.raises(UserError, match=message):
        HybridStrategy(**settings)


def test_the_strategy_resumes_no_run_that_is_over(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NeMo's overrides set ``trainer.max_steps`` after the factory has looked."""
    from nemo_megacpp.nemo import strategy

    monkeypatch.setattr(strategy, "guard_load", lambda path, **_: path)  # its scan wants ranks
    run = _fake_run()
    run.trainer.max_steps = 4
    resuming = SimpleNamespace(
        lightning_module=run,
        trainer=run.trainer,
        should_restore_optimizer_states=lambda selective_restore: True,
    )
    weights = save(from_mapping({"recipe": "nam56r_tiny"}), 4) / "weights"  # as NeMo gives it
    with pytest.raises(UserError, match=r"The run is complete: .* step 4, and max_steps=4"):
        strategy.HybridStrategy.load_checkpoint(resuming, weights)
    other = save(from_mapping({"recipe": "nam56r_tiny", "add_qkv_bias": True}), 5) / "weights"
    with pytest.raises(UserError, match="add_qkv_bias is True there and False here"):
        strategy.HybridStrategy.load_checkpoint(resuming, other)


def test_data_of_another_kind_have_no_fingerprint() -> None:
    assert tokenizer_of(data_of()) is None
    assert tokenizer_of(data_of(tokenizer_fingerprint="f" * 64)) == "f" * 64
