"""Families that a user adds: what is refused, and with which words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_megacpp import families
from nemo_megacpp.errors import UserError
from nemo_megacpp.families import BlockFamily, load_families, register
from nemo_megacpp.layout.rules import Divides
from nemo_megacpp.pattern import HybridPattern, family


@pytest.fixture(autouse=True)
def _leave_no_family_behind() -> Iterator[None]:
    families.registered()
    known, added = dict(family._families), dict(families._registered)
    yield
    family._families.clear()
    family._families.update(known)
    families._registered.clear()
    families._registered.update(added)


def _spec(backend: object, settings: object) -> None:
    raise AssertionError("no stack is built here")


def test_a_letter_is_legal_once_its_family_is_registered() -> None:
    with pytest.raises(UserError, match="'Z' is not a letter"):
        HybridPattern.parse("AZ")
    register(BlockFamily("Z", _spec))
    assert HybridPattern.parse("az, zblock").letters == "AZZ"
    assert HybridPattern.parse("AZ").to_megatron("hybrid_override_pattern") == "*Z"


def test_registering_twice_is_once_and_another_family_is_refused() -> None:
    rule = Divides("width", "hidden_size", "tp", "whole channels")
    block = register(BlockFamily("Z", _spec, rules=(rule,)))
    assert register(BlockFamily("Z", _spec, rules=(rule,))) == block
    assert [added.letter for added in families.added()].count("Z") == 1
    with pytest.raises(UserError, match="Two block families"):
        register(BlockFamily("Z", lambda backend, settings: _spec(backend, settings)))


@pytest.mark.parametrize("letter", ["A", "M", "E", "R", "F"])
def test_the_letters_of_built_in_families_are_taken(letter: str) -> None:
    with pytest.raises(UserError, match="A, M, E, R, F are taken"):
        register(BlockFamily(letter, _spec))


@pytest.mark.parametrize("letter", ["", "ZZ", "z", "|", "Ä", "1"])
def test_other_signs_are_no_letters(letter: str) -> None:
    with pytest.raises(UserError, match="one of A to Z"):
        register(BlockFamily(letter, _spec))


def test_modules_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    broken, empty = tmp_path / "broken.py", tmp_path / "empty.py"
    broken.write_text("1 / 0\n")
    empty.write_text("x = 1\n")
    with pytest.raises(UserError, match=r"broken\.py cannot be imported: ZeroDivisionError"):
        load_families([str(broken)])
    with pytest.raises(UserError, match=r"empty\.py registers no family"):
        load_families([str(empty)])
    with pytest.raises(UserError, match="file not found"):
        load_families([str(tmp_path / "missing.py")])
    with pytest.raises(UserError, match="cannot be imported: ModuleNotFoundError"):
        load_families(["no_such_package.family"])


def test_a_module_is_named_before_its_code_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stderr, once in a process, by the first rank of a job."""
    from nemo_megacpp.recipes.recipe import resolve

    loud = "import sys\nprint('RUNS', file=sys.stderr)\n"
    paths = [tmp_path / f"{name}.py" for name in ("one", "two", "three")]
    for path in paths:
        path.write_text(loud)
    for path in paths[:2]:
        with pytest.raises(UserError, match="registers no family"):
            resolve("nam56r_tiny", [f"family_modules=[{path}]"])
        said = capsys.readouterr().err.splitlines()
        assert said == [f"family module {path}: its code runs in this process", "RUNS"]
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="registers no family"):
        resolve("nam56r_tiny", [f"family_modules=[{paths[2]}]"])
    assert capsys.readouterr().err == "RUNS\n"


def test_a_recorded_recipe_names_its_module_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe in a run folder is a file as any other: ``report`` reads it."""
    from nemo_megacpp.runs.record import read_run

    module, record = tmp_path / "module\x1b[2J.py", tmp_path / "run" / "record"
    module.write_text("import sys\nprint('RUNS', file=sys.stderr)\n")
    record.mkdir(parents=True)
    step = '{"step": 1, "loss": 1.0, "seconds": 1.0, "tokens_per_second": 1.0, "aux": {}}'
    (record / "metrics.jsonl").write_text(f"{step}\n")
    escaped = str(module).replace("\x1b", "\\x1b")
    (record / "recipe.yaml").write_text(f'recipe: nam56r_tiny\nfamily_modules: ["{escaped}"]\n')
    with pytest.raises(UserError, match="registers no family"):
        read_run(tmp_path / "run")
    line = f"family module '{escaped}': its code runs in this process"
    assert capsys.readouterr().err.splitlines() == [line, "RUNS"]
