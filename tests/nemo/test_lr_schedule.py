"""The learning-rate schedules are Megatron's, at both front ends."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import fiddle
import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_megacpp.errors import UserError
from nemo_megacpp.megatron_args.argument_list import megatron_arguments
from nemo_megacpp.megatron_args.dialect import choose
from nemo_megacpp.recipes.recipe import resolve

SCHEDULES = {
    "cosine": (),
    "constant": ("lr_decay_style=constant",),
    "linear": ("lr_decay_style=linear", "min_lr=0"),
    **{
        f"WSD {style}": (
            *("lr_decay_style=WSD", "lr_wsd_decay_steps=9"),
            f"lr_wsd_decay_style={style}",
        )
        for style in ("exponential", "linear", "cosine", "minus_sqrt")
    },
}
WARM_UPS = {
    "warm-up": ("warmup_steps=7",),
    "warm-up from 0": ("warmup_steps=7", "lr_warmup_init=0"),
    "no warm-up": ("warmup_steps=0",),
}
STEPS = 40


def _optimizer(config: Any = None) -> Any:
    return SimpleNamespace(
        param_groups=[{"lr": None, "wd_mult": 1.0}, {"lr": None, "wd_mult": 0.0}],
        mcore_optimizer=SimpleNamespace(config=config),
    )


def _schedule(*settings: str, steps: int = STEPS) -> Any:
    """Return the schedule of a run of ``nemo-megacpp train``."""
    from pathlib import Path

    from nemo_megacpp.nemo.pretrain_task import to_pretrain

    recipe = resolve("nam56r_tiny", (f"max_steps={steps}", *settings))
    optim = to_pretrain(recipe, Path("run"), devices=2).optim
    scheduler = fiddle.build(optim.lr_scheduler)
    found = scheduler.scheduler(None, _optimizer(fiddle.build(optim.config)))
    return found["lr_scheduler"]["scheduler"]


def _rates(schedule: Any, steps: int = STEPS, increment: int = 1) -> list[float]:
    """Return the learning rate of every step; weight decay never changes."""
    rates = []
    for _ in range(steps):
        first, second = schedule.optimizer.param_groups
        assert (first["lr"], second["weight_decay"]) == (second["lr"], 0.0)
        assert first["weight_decay"] == 0.01
        rates.append(first["lr"])
        schedule.step(increment)
    return rates


def _of_the_script(*settings: str) -> OptimizerParamScheduler:
    """Return what Megatron-LM's script builds of its arguments (get_optimizer_param_scheduler)."""
    recipe = resolve("nam56r_tiny", (f"max_steps={STEPS}", *settings))
    words, _ = megatron_arguments(recipe, choose("core_v0.16.1")[0], "there", "cpu")
    told = dict(itertools.pairwise(words))
    batch = int(told["--global-batch-size"])
    wsd = told.get("--lr-wsd-decay-iters")
    return OptimizerParamScheduler(
        _optimizer(),
        init_lr=float(told.get("--lr-warmup-init", 0.0)),
        max_lr=float(told["--lr"]),
        min_lr=float(told["--min-lr"]),
        lr_warmup_steps=int(told["--lr-warmup-iters"]) * batch,
        lr_decay_steps=int(told["--lr-decay-iters"]) * batch,
        lr_decay_style=told["--lr-decay-style"],
        start_wd=float(told["--weight-decay"]),
        end_wd=float(told["--weight-decay"]),
        wd_incr_steps=STEPS * batch,
        wd_incr_style="constant",
        wsd_decay_steps=None if wsd is None else int(wsd) * batch,
        lr_wsd_decay_style=told.get("--lr-wsd-decay-style"),
    )


@pytest.mark.parametrize("warm_up", WARM_UPS)
@pytest.mark.parametrize("style", SCHEDULES)
def test_every_step_has_the_learning_rate_of_megatrons_script(style: str, warm_up: str) -> None:
    settings = (*SCHEDULES[style], *WARM_UPS[warm_up])
    ours, theirs = _rates(_schedule(*settings)), _rates(_of_the_script(*settings), increment=8)
    assert ours == pytest.approx(theirs, rel=1e-12)
    first = {"warm-up": 4e-3 / 8, "warm-up from 0": 0.0, "no warm-up": 4e-3}[warm_up]
    assert ours[0] == pytest.approx(first)
    assert max(ours) == pytest.approx(4e-3)
    assert (ours[-1] < 1.5e-3) is (style != "constant")


def test_the_cosine_is_nemos() -> None:
    """So a recipe that says nothing trains as before."""
    import torch
    from nemo.core.optim.lr_scheduler import CosineAnnealing

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=4e-3)
    theirs = CosineAnnealing(optimizer, max_steps=STEPS, warmup_steps=7, min_lr=4e-4)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert _rates(_schedule("warmup_steps=7")) == pytest.approx(rates, rel=1e-15)


@pytest.mark.parametrize("style", SCHEDULES)
def test_a_resumed_schedule_continues(style: str) -> None:
    settings = (*SCHEDULES[style], "warmup_steps=7")
    at_once = _rates(_schedule(*settings))
    first = _schedule(*settings)
    _rates(first, 20)
    resumed = _schedule(*settings)
    resumed.load_state_dict(first.state_dict())
    assert _rates(resumed, 20) == at_once[20:]


def test_the_settings_of_a_resumed_run_hold(caplog: pytest.LogCaptureFixture) -> None:
    """A longer run is as long as it says, and a WSD run decays when it is told to."""
    first = _schedule("lr_decay_style=constant", "warmup_steps=7")
    _rates(first, 20)
    resumed = _schedule("lr_decay_style=WSD", "lr_wsd_decay_steps=9", "warmup_steps=7", steps=60)
    with caplog.at_level("INFO", logger="nemo_megacpp"):
        resumed.load_state_dict(first.state_dict())
    rates = _rates(resumed, 40)
    assert rates[:32] == [4e-3] * 32 and rates[32] < 4e-3
    assert "lr_decay_style constant -> WSD, lr_decay_steps 40 -> 60" in caplog.text


def test_the_checkpoint_of_a_nemo_scheduler_is_resumed() -> None:
    resumed = _schedule("warmup_steps=7")
    resumed.load_state_dict({"last_epoch": 20, "base_lrs": [1.0]})
    assert _rates(resumed, 20) == _rates(_schedule("warmup_steps=7"))[20:]


def test_a_peak_below_the_minimum() -> None:
    from nemo_megacpp.nemo.lr_schedule import MegatronScheduler

    config = SimpleNamespace(lr=1e-5, min_lr=1e-4, weight_decay=0.1)
    with pytest.raises(UserError, match=r"min_lr: 0\.0001 is above lr=1e-05"):
        MegatronScheduler(max_steps=3).scheduler(None, _optimizer(config))
