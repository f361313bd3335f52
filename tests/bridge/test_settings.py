"""Every setting of a recipe has a fate at Bridge's door; none is dropped in silence."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_megacpp.bridge.settings import FATES, validate_carried
from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.names import RUN_KEYS
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.training import Training


def test_every_setting_has_a_fate() -> None:
    named = {field.name for field in dataclasses.fields(Training)}
    assert set(FATES) == named | set(RUN_KEYS)


def test_what_is_refused_has_a_default_that_asks_for_nothing() -> None:
    for name, fate in FATES.items():
        assert bool(fate.legal) == (fate.kind == "refused"), name
    validate_carried(resolve("nam56r_tiny"))


@pytest.mark.parametrize("setting", ["async_save=true", "use_pytorch_profiler=true"])
def test_a_refusal_names_the_setting(setting: str) -> None:
    with pytest.raises(
        UserError, match=f"{setting.partition('=')[0]}=True through bridge: .*False"
    ):
        validate_carried(resolve("nam56r_tiny", [setting]))


def test_depth_state_and_virtual_stages_are_refused_together() -> None:
    both = ["pattern=RAER", "depth=4", "pp=2", "vpp=2", "m2rnn_depth_state=true"]
    with pytest.raises(UserError, match="m2rnn_depth_state=true with virtual_pipeline_model_"):
        validate_carried(resolve("nam56r_tiny", both))
    for left_out in (3, 4):
        validate_carried(resolve("nam56r_tiny", both[:left_out] + both[left_out + 1 :]))
