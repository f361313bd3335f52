"""The settings as help text."""

from __future__ import annotations

import dataclasses

from nemo_megacpp.recipes.describe import settings_help
from nemo_megacpp.recipes.names import full_name
from nemo_megacpp.recipes.training import Training, groups


def test_every_setting_of_a_run_is_described_once() -> None:
    listed = [name for names in groups().values() for name in names]
    assert listed == [field.name for field in dataclasses.fields(Training)]
    lines = settings_help().splitlines()
    for name in listed:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert len(line.split()) > 2


def test_lines_fit_a_terminal_and_show_defaults() -> None:
    text = settings_help()
    assert max(map(len, text.splitlines())) <= 100
    assert "Optimizer steps of the whole run" in text and "[1000]" in text


def test_choices_and_ranges_are_those_that_are_declared() -> None:
    text = " ".join(settings_help().split())
    assert "(constant, linear, cosine, WSD) [cosine]" in text
    assert "AdamW beta2 (at least 0 and below 1) [0.95]" in text
    assert "Shard the optimizer state over data-parallel ranks [true]" in text


def test_every_name_that_is_listed_is_a_setting() -> None:
    lines = [line for line in settings_help().splitlines() if line[:2] == "  " and line[2] != " "]
    names = [line.split()[0] for line in lines if not line.startswith("  …")]
    assert len(names) > 35
    for name in names:
        full_name(name)
