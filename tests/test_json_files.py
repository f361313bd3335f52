"""A JSON file of another shape, or too large, too deep or out of range, ends in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from nemo_megacpp.errors import UserError
from nemo_megacpp.json_files import Count, Text, parse_json, read_limited

SHAPE = TypeAdapter(dict[Text, dict[str, Count]])


def refusal(text: str) -> str:
    with pytest.raises(UserError) as refused:
        parse_json(text.encode(), SHAPE, Path("it.json"))
    message = str(refused.value)
    assert message.startswith("it.json is damaged: ") and message.endswith(".")
    assert "\n" not in message and len(message) < 400
    return message


def test_what_fits_is_returned() -> None:
    assert parse_json(b'{"a": {"b": 3}}', SHAPE, Path("it.json")) == {"a": {"b": 3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid JSON: EOF"),
        ("[1]", "should be an object"),
        ('{"a": [1]}', "a should be an object, and is [1]"),
        ('{"a": {"b": "3"}}', "a.b should be a valid integer, and is '3'"),
        ('{"a": {"b": true}}', "a.b should be a valid integer, and is True"),
        ('{"a": {"b": -1}}', "a.b should be greater than or equal to 0, and is -1"),
        ('{"a": {"b": 1e400}}', "a.b should be a valid integer, and is inf"),
        ('{"a": {"b": ' + "9" * 400 + "}}", "a.b should be less than or equal to 9007199254740992"),
        ('{"a": {"b": ' + "9" * 9999 + "}}", "number out of range"),
        ("[" * 100_000, "recursion limit exceeded"),
        ('{"a": {"b": "' + "x" * 999 + '"}}', "x..."),
        ('{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}', "; and 2 more."),
    ],
)
def test_what_does_not_fit_is_named(text: str, message: str) -> None:
    assert message in refusal(text)


def test_size_is_limited_before_anything_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    path.write_bytes(b"x" * 100)
    assert read_limited(path, 100) == b"x" * 100
    with pytest.raises(UserError, match=r"it\.json is damaged: it is larger than 99 bytes\."):
        read_limited(path, 99)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read: "):
            read_limited(missing, 99)


def test_a_missing_key_is_named() -> None:
    from nemo_megacpp.checkpoint.identity import Identity

    with pytest.raises(UserError, match=r"tokenizer: field required; step: field required\."):
        parse_json(b'{"model": {}}', TypeAdapter(Identity), Path("nemo_megacpp.json"))
