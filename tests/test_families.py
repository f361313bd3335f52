"""Families that a user adds: what is refused, and with which words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_megacpp import families, pattern
from nemo_megacpp.errors import UserError
from nemo_megacpp.families import BlockFamily, load_families, register
from nemo_megacpp.layout.rules import Divides
from nemo_megacpp.pattern import HybridPattern


@pytest.fixture(autouse=True)
def _leave_no_family_behind() -> Iterator[None]:
    families.registered()
    known, added = dict(pattern._families), dict(families._registered)
    yield
    pattern._families.clear()
    pattern._families.update(known)
    families._registered.clear()
    families._registered.update(added)


def _spec(backend: object, settings: object) -> None:
    raise AssertionError("no stack is built here")


def test_a_letter_is_legal_once_its_family_is_registered() -> None:
    with pytest.raises(UserError, match="'Z' is not a letter"):
        HybridPattern.parse("AZ")
    register(BlockFamily("Z", _spec))
    assert HybridPattern.parse("az, zblock").letters == "AZZ"
    assert HybridPattern.parse("AZ").to_megatron() == "*Z"


def test_registering_twice_is_once_and_another_family_is_refused() -> None:
    rule = Divides("width", "hidden_size", "tp", "whole channels")
    block = register(BlockFamily("Z", _spec, rules=(rule,)))
    assert register(BlockFamily("Z", _spec, rules=(rule,))) == block
    assert [added.letter for added in families.added()].count("Z") == 1
    with pytest.raises(UserError, match="Two block families"):
        register(BlockFamily("Z", lambda backend, settings: _spec(backend, settings)))


@pytest.mark.parametrize("letter", ["A", "M", "E", "R"])
def test_the_four_letters_are_taken(letter: str) -> None:
    with pytest.raises(UserError, match="A, M, E, R are taken"):
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
