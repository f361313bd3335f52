"""The settings as help text."""

from __future__ import annotations

import dataclasses

from nemo_megacpp.recipes.catalog import Training
from nemo_megacpp.recipes.describe import GROUPS, settings_help
from nemo_megacpp.recipes.names import full_name


def test_every_setting_of_a_run_is_described_once() -> None:
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(Training))
    lines = settings_help().splitlines()
    for name in listed:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert len(line.split()) > 1


def test_lines_fit_a_terminal_and_show_defaults() -> None:
    text = settings_help()
    assert max(map(len, text.splitlines())) <= 100
    assert "optimizer steps of the whole run" in text and "[1000]" in text


def test_every_name_that_is_listed_is_a_setting() -> None:
    lines = [line for line in settings_help().splitlines() if line[:2] == "  " and line[2] != " "]
    names = [line.split()[0] for line in lines if not line.startswith("  …")]
    assert len(names) > 35
    for name in names:
        full_name(name)
