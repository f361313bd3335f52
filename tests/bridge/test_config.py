"""Each setting of a recipe has its value at its place in the configuration that Bridge trains with.

In Bridge's environment (``make test-bridge``).
"""

from __future__ import annotations

import dataclasses
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from nemo_megacpp.bridge.settings import FATES
from nemo_megacpp.bridge.versions import describe_mismatch
from nemo_megacpp.recipes.recipe import Recipe, resolve

NO_BRIDGE = describe_mismatch()
pytestmark = pytest.mark.skipif(NO_BRIDGE is not None, reason=f"Bridge's environment: {NO_BRIDGE}")

PLACES: dict[str, tuple[Any, dict[str, Any]]] = {
    "micro_batch_size": (2, {"train.micro_batch_size": 2}),
    "global_batch_size": (6, {"train.global_batch_size": 6}),
    "max_steps": (777, {"train.train_iters": 777, "scheduler.lr_decay_iters": 777}),
    "stop_after": (55, {"train.exit_interval": 55}),
    "seed": (77, {"rng.seed": 77, "dataset.seed": 77}),
    "lr": (0.002, {"optimizer.lr": 0.002}),
    "min_lr": (0.0003, {"optimizer.min_lr": 0.0003}),
    "warmup_steps": (7, {"scheduler.lr_warmup_iters": 7}),
    "lr_warmup_init": (0.0001, {"scheduler.lr_warmup_init": 0.0001}),
    "lr_decay_style": ("WSD", {"scheduler.lr_decay_style": "WSD"}),
    "lr_wsd_decay_steps": (70, {"scheduler.lr_wsd_decay_iters": 70}),
    "lr_wsd_decay_style": ("linear", {"scheduler.lr_wsd_decay_style": "linear"}),
    "weight_decay": (
        0.3,
        {
            "optimizer.weight_decay": 0.3,
            "scheduler.start_weight_decay": 0.3,
            "scheduler.end_weight_decay": 0.3,
        },
    ),
    "adam_beta1": (0.8, {"optimizer.adam_beta1": 0.8}),
    "adam_beta2": (0.97, {"optimizer.adam_beta2": 0.97}),
    "adam_eps": (1e-6, {"optimizer.adam_eps": 1e-6}),
    "clip_grad": (0.5, {"optimizer.clip_grad": 0.5}),
    "use_distributed_optimizer": (
        True,
        {"optimizer.use_distributed_optimizer": True, "ddp.use_distributed_optimizer": True},
    ),
    "overlap_grad_reduce": (True, {"ddp.overlap_grad_reduce": True}),
    "overlap_param_gather": (
        False,
        {"optimizer.overlap_param_gather": False, "ddp.overlap_param_gather": False},
    ),
    "precision": (
        "bf16",
        {"optimizer.bf16": True, "model.bf16": True, "ddp.grad_reduce_in_fp32": True},
    ),
    "val_check_interval": (33, {"validation.eval_interval": 33}),
    "limit_val_batches": (3, {"validation.eval_iters": 3, "dataset.rows_per_evaluation": 18}),
    "tensorboard": (False, {"logger.tensorboard_dir": None}),
    "wandb_project": ("project", {"logger.wandb_project": "project"}),
    "wandb_name": ("name", {"logger.wandb_exp_name": "name"}),
    "save_interval": (44, {"checkpoint.save_interval": 44}),
    "data": ("some/folder", {"dataset.sources": {"some/folder": None}}),
    "run_dir": ("here", {"checkpoint.save": "here/checkpoints"}),
    "resume": ("there/step=1", {"checkpoint.load": "there/step=1"}),
    "init_from": ("old/step=2", {"checkpoint.pretrained_checkpoint": "old/step=2"}),
    # Done around Bridge's loop, by what its configuration holds for us.
    "log_interval": (3, {"logger.log_interval": 3}),
    "keep_latest": (2, {"model.keep_latest": 2}),
    "keep_every": (88, {"model.keep_every": 88}),
    "init_side_channels": ("any", {"model.init_side_channels": "any"}),
}
"""Setting -> a value, and what Bridge's configuration holds for it."""

OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "packed_documents": (True, {"dataset.packed_documents": True}),  # of one row a microbatch
    "use_distributed_optimizer": (
        False,
        {
            "optimizer.use_distributed_optimizer": False,
            "ddp.use_distributed_optimizer": False,
            "optimizer.overlap_param_gather": False,
            "ddp.overlap_param_gather": False,
        },
    ),
    "overlap_grad_reduce": (False, {"ddp.overlap_grad_reduce": False}),
    "precision": ("fp32", {"optimizer.bf16": False, "model.bf16": False, "mixed_precision": None}),
    "tensorboard": (True, {"logger.tensorboard_dir": "here/tensorboard"}),
    "run_dir": ("here", {"logger.wandb_exp_name": "here"}),
}


def _recipe(table: dict[str, tuple[Any, Any]]) -> Recipe:
    return resolve("nam56r_tiny", [f"{name}={value}" for name, (value, _) in table.items()])


def test_every_carried_setting_is_in_a_table() -> None:
    carried = {name for name, fate in FATES.items() if fate.kind == "carried"}
    assert carried <= PLACES.keys() | OTHERS.keys()
    plain = resolve("nam56r_tiny")
    for name, (value, _) in PLACES.items():
        either = {value, OTHERS.get(name, (value,))[0]}
        default = getattr(plain.training, name, None)
        assert either - {default}, f"{name}={value} is the default"


@pytest.mark.parametrize("table", [PLACES, OTHERS], ids=["every setting", "the other value"])
def test_a_setting_has_its_value_at_its_place(
    table: dict[str, tuple[Any, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As it is built, and after Bridge has derived what it derives and has validated the rest."""
    from tests.bridge import bridge_ranks  # noqa: F401, I001  (imports Bridge on this host)
    from megatron.bridge.training.config import runtime_config_update
    from nemo_megacpp.bridge.config import to_config

    monkeypatch.chdir(tmp_path)
    for folder in ("there/step=1", "old/step=2"):
        Path(folder).mkdir(parents=True)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    recipe = _recipe(table)
    config = to_config(recipe, Path("here"))
    for name, (value, _) in table.items():
        given = getattr(recipe.training, name, getattr(recipe, name, None))
        assert given == value, f"{name} is a setting of the recipe"
    _validate_places(config, table)
    runtime_config_update(config)
    _validate_places(config, table)


def _validate_places(config: Any, table: dict[str, tuple[Any, dict[str, Any]]]) -> None:
    held = {
        (name, place): reduce(getattr, place.split("."), config)
        for name, (_, places) in table.items()
        for place in places
    }
    assert held == {
        (name, place): value
        for name, (_, places) in table.items()
        for place, value in places.items()
    }


def test_fields_of_model_and_layout_reach_the_provider() -> None:
    """Each of them, by its own name."""
    from nemo_megacpp.bridge.config import to_config
    from nemo_megacpp.bridge.provider import make_provider
    from nemo_megacpp.config import HybridConfig
    from tests.bridge import bridge_ranks  # noqa: F401

    marks = {field.name: object() for field in dataclasses.fields(HybridConfig) if field.init}
    provider = make_provider(marks)
    for name, mark in marks.items():
        assert getattr(provider, name) is mark, name
    recipe = resolve("nam56r_tiny", ["tp=2", "pp=2", "ep=2", "etp=1", "mamba_state_dim=16"])
    model = to_config(recipe, Path("here")).model
    for name, value in {**recipe.model, **recipe.layout.megatron_fields()}.items():
        assert getattr(model, name) == value, name
