"""Lines that are no documents: skipped, and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.reading import read


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "is not JSON: Expecting value in column 9."),
        ("[1]", "is a JSON list, not an object with a text."),
        ('{"txt": "a"}', "has no field 'text'; its fields: txt. Did you mean 'txt'?"),
        ('{"text": 5}', "has a int in field 'text', not a string."),
        ("\0\0\0", "is not JSON: it has NUL bytes."),
    ],
)
def test_bad_json_line_is_named_and_skipped(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n' + line + '\n{"text": "fine, too"}\n')
    found, tally = read(tmp_path)
    assert [d.key for d in found] == ["x.jsonl:1", "x.jsonl:3"]
    assert tally.names["bad_file"] == [f"{path}:2 {message}"]
    path.write_text((line + "\n") * 1200)
    _, tally = read(tmp_path)
    assert tally.counts == {"bad_line": 1200, "bad_file": 1}
    (named,) = tally.names["bad_file"]
    assert named == f"{path}:1 {message} (1,199 more malformed lines in this file)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "has a number of too many digits."),
        ("[" * 500_000, "is not JSON: it is nested too deeply."),
        ('{"text": "a", "n": 1e999999999}', None),
        ("{" + ", ".join(f'"{n:0500}": 1' for n in range(2000)) + "}", "has no field 'text'"),
        ('{"text": "a", "b": "' + "x" * 200_000 + '"}', None),
    ],
)
def test_hostile_lines_are_skipped_and_named(
    tmp_path: Path, line: str, message: str | None
) -> None:
    source = tmp_path / "lines.jsonl"
    source.write_text(line + '\n{"text": "next"}\n')
    found, tally = read(source)
    assert [document.text for document in found] == ["a", "next"][message is not None :]
    names = tally.names.get("bad_file", [])
    if message is None:
        assert not names
    else:
        assert message in names[0] and names[0].startswith(f"{source}:1 ") and len(names[0]) < 1500


def test_text_key(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "b", "text": "t"}\n')
    assert [d.text for d in read(tmp_path, text_key="body")[0]] == ["b"]
