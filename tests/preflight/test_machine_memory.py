"""A model that this machine cannot hold ends in one message, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_megacpp.contract.layout_plan import make_plan
from nemo_megacpp.errors import UserError
from nemo_megacpp.hybrid_fields import LARGEST
from nemo_megacpp.preflight import machine_memory
from nemo_megacpp.preflight.machine_memory import validate_memory
from nemo_megacpp.recipes.catalog import CATALOG
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.views import job_of
from nemo_megacpp.start import train_recipe


@pytest.mark.parametrize("key", LARGEST)
def test_a_size_beyond_reason_is_refused_by_every_command(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: 999,999,999 is more than {LARGEST[key]:,}, the"):
        resolve("nam56r_tiny", [f"{key}=999999999"])
    for value in (10**20, -(10**20)):
        with pytest.raises(UserError, match=f"{key}: .* is beyond"):
            resolve("nam56r_tiny", [f"{key}={value}"])


def test_a_model_larger_than_the_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^The model has [\d,]+ parameters: the 2 ranks on this"):
        train_recipe(resolve("nam56r_tiny", ["hidden_size=1048576", "vocab_size=2048"]))
    assert not list(tmp_path.iterdir())


def test_what_fits_needs_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_memory, "make_plan", lambda job: pytest.fail("planned"))
    validate_memory(resolve("nam56r_tiny"), 2)


@pytest.mark.parametrize("name", CATALOG)
@pytest.mark.parametrize("mode", ["nemo_native", "mamba3"])
def test_the_cheap_count_is_never_too_low(name: str, mode: str) -> None:
    recipe = resolve(name, [f"mode={mode}"])
    exact = make_plan(job_of(recipe)).parameters
    assert exact <= machine_memory._most_parameters(recipe)


def test_the_ranks_on_this_machine_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve("nam56r_tiny")
    plan = make_plan(job_of(recipe))
    held = sum(
        stage.ranks * (stage.memory.total - stage.memory.activations) for stage in plan.stages
    )
    for there, fits in ((held, True), (held - 1, False), (held // 2, False)):
        monkeypatch.setattr(machine_memory, "_of_machine", lambda there=there: there)
        if fits:
            validate_memory(recipe, 2)
        else:
            with pytest.raises(UserError, match="would hold"):
                validate_memory(recipe, 2)
    validate_memory(recipe, 1)  # the other rank is on another machine
