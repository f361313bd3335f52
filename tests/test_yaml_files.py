"""YAML that is small and costs much ends in one message that names the line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.given import read_command_line, read_yaml
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.yaml_files import parse_yaml
from tests.malformed import hostile_yaml

_SECONDS = 5
CASES = dict(hostile_yaml())


def test_what_recipes_write_is_read() -> None:
    text = "base: &b {a: 1, b: [x, 0.5, 1e-3]}\nmore: {<<: *b, b: null}\nsame: *b\n"
    held, _ = parse_yaml(text)
    assert held["more"] == {"a": 1, "b": None} and held["same"] is held["base"]


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_recipe_ends_in_one_message(case: str, tmp_path: Path) -> None:
    path = tmp_path / "it.yaml"
    path.write_bytes(CASES[case].encode())
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        resolve(str(path))
    assert time.monotonic() - began < _SECONDS
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("billion laughs", "has more than 20,000 values, aliases expanded, up to line "),
        ("many aliases", "has more than 100 aliases, in line 2."),
        ("alias of itself", "refers to 'a' inside itself in line 1."),
        ("brackets", "is nested deeper than 50 in line 1."),
        ("dashes", "is nested deeper than 50 in line 2."),
        ("many hexadecimal digits", "has a number of 10,002 characters in line 1."),
        ("duplicate key", "gives max_steps twice, again in line 2."),
        ("large", "is damaged: it is larger than 1,048,576 bytes."),
        ("long text", "is damaged: it is larger than 1,048,576 bytes."),
    ],
)
def test_the_message_names_the_file_and_the_line(case: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "it.yaml"
    path.write_bytes(CASES[case].encode())
    with pytest.raises(UserError) as refused:
        read_yaml(path)
    assert str(refused.value).startswith(f"{path} {message}")


_DEEP = {"open": "[" * 5000, "closed": "[" * 5000 + "]" * 5000, "braces": "{a: " * 5000}


@pytest.mark.parametrize("case", [*_DEEP, "&a [*a]", "9" * 50, "0x" + "f" * 99])
def test_a_hostile_override_ends_in_one_message(case: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^data ") as refused:
        read_command_line([f"data={_DEEP.get(case, case)}"])
    assert time.monotonic() - began < _SECONDS
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("key", ["run_dir", "resume", "init_from", "tokenizer", "data"])
@pytest.mark.parametrize(
    "name", ["a\0b", "a\x1b[2Jb", "a\u202eb", "x" * 5000], ids=["NUL", "ESC", "bidi", "long"]
)
def test_no_path_holds_control_characters(key: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "it.yaml"
    path.write_text(f"{key}: {json.dumps(name)}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"{key}: .* cannot be used: a path or name has"):
        resolve(str(path))
