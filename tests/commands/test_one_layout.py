"""Degrees on a command line are laid over the recipe's layout: the same at every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_megacpp import start
from nemo_megacpp.checkpoint import rewrite
from nemo_megacpp.cli import read_arguments
from nemo_megacpp.commands import layouts as layouts_command
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof import verification
from nemo_megacpp.recipes.recipe import Recipe, resolve

TEXTS = {
    # nam56r_tiny has tp=2,sp=true,etp=1.
    "tp=2,cp=2": "tp=2,sp=true,cp=2,etp=1",
    "cp=2": "tp=2,sp=true,cp=2,etp=1",
    "tp=1,pp=2": "tp=1,sp=false,pp=2,etp=1",
    "tp=4,etp=none": "tp=4,sp=true",
    "pp=2,world=8": "tp=2,sp=true,pp=2,etp=1,world=8",
}
TINY = ("nam56r_tiny", "micro_batch_size=1")

Seen = list[ParallelLayout]


def _run(*words: str) -> None:
    args = read_arguments(list(words))
    args.run(args)


def _train(words: list[str], seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "train_recipe", lambda recipe, **_: seen.append(recipe.layout))
    _run("train", *words)


def _verify(words: list[str], seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    def verify_layout(model: Any, layout: ParallelLayout, *rest: Any, **named: Any) -> list[Any]:
        seen.append(layout)
        return []

    monkeypatch.setattr(verification, "verify_layout", verify_layout)
    _run("verify", *words)


def _plan(words: list[str], seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_megacpp.recipes import views

    def job_of(recipe: Recipe, **_: Any) -> Any:
        seen.append(recipe.layout)
        raise SystemExit

    monkeypatch.setattr(views, "job_of", job_of)
    with pytest.raises(SystemExit):
        _run("plan", *words)


def _layouts(words: list[str], seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """``layouts`` searches: it resolves the same layout, and holds the degrees that were given."""

    def say(recipe: Recipe) -> None:
        seen.append(recipe.layout)
        raise SystemExit

    monkeypatch.setattr(layouts_command, "print_assumed", say)
    with pytest.raises(SystemExit):
        _run("layouts", *words)


def _ladder(words: list[str], seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_megacpp.proof import ladder

    def build_ladder(model: Any, layout: ParallelLayout, *_: Any) -> Any:
        seen.append(layout)
        raise SystemExit

    monkeypatch.setattr(ladder, "build_ladder", build_ladder)
    with pytest.raises(SystemExit):
        _run("ladder", *words)


def _compare(words: list[str], seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_megacpp.runs import comparison

    def compare_sides(a: Any, b: Any, **_: Any) -> Any:
        seen.extend([a.recipe.layout, b.recipe.layout])
        raise SystemExit

    monkeypatch.setattr(comparison, "compare_sides", compare_sides)
    name, *settings = words
    sides = [word for setting in settings for word in ("--in-a", setting, "--in-b", setting)]
    with pytest.raises(SystemExit):
        _run("compare", name, name, *sides)


def _megatron_args(words: list[str], seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_megacpp.megatron_args import argument_list

    def megatron_arguments(recipe: Recipe, *_: Any) -> tuple[list[str], list[str]]:
        seen.append(recipe.layout)
        return [], []

    monkeypatch.setattr(argument_list, "megatron_arguments", megatron_arguments)
    _run("megatron-args", *words)


def _doctor(words: list[str], seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_megacpp.doctor import fit, machine

    def recipe_findings(recipe: Recipe, gpus: int) -> list[Any]:
        seen.append(recipe.layout)
        return []

    monkeypatch.setattr(fit, "recipe_findings", recipe_findings)
    monkeypatch.setattr(machine, "package_findings", lambda gpus: [])
    monkeypatch.setattr(machine, "machine_findings", lambda gpus: [])
    _run("doctor", *words)


COMMANDS: dict[str, Callable[[list[str], Seen, pytest.MonkeyPatch], None]] = {
    "train": _train,
    "verify": _verify,
    "ladder": _ladder,
    "plan": _plan,
    "layouts": _layouts,
    "compare": _compare,
    "megatron-args": _megatron_args,
    "doctor": _doctor,
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_one_text_is_one_layout_at_every_command(
    command: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = ParallelLayout.parse(TEXTS[text])
    degrees = text.split(",")
    seen: Seen = []
    COMMANDS[command]([*TINY, *degrees], seen, monkeypatch)
    if command != "compare":  # its --in-b takes settings only
        COMMANDS[command]([*TINY, "--layout", text], seen, monkeypatch)
        COMMANDS[command]([*TINY, *degrees[1:], "--layout", degrees[0]], seen, monkeypatch)
    assert seen and set(seen) == {expected}


@pytest.mark.parametrize("text", [text for text in TEXTS if "none" not in text])
def test_a_factory_has_the_same_layout(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from nemo_megacpp.nemo import factories
    from nemo_megacpp.recipes.given import read_command_line
    from nemo_megacpp.recipes.names import full_names

    monkeypatch.chdir(tmp_path)
    expected = ParallelLayout.parse(TEXTS[text])
    given = full_names(read_command_line((), text))
    world = given.pop("world_size", None)
    strategy = factories.nam56r_tiny(
        **{name: int(value) for name, value in given.items()},
        devices=None if world is None else int(world),
        micro_batch_size=1,
    ).trainer.strategy
    fields = expected.megatron_fields()
    assert {name: getattr(strategy, name) for name in fields} == fields


@pytest.mark.parametrize("text", TEXTS)
def test_a_checkpoint_is_resharded_to_the_same_layout(
    text: str,
    save: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The layout that a checkpoint was saved in is in the place of the recipe's."""
    seen: Seen = []

    def reshard(source: Path, out: Path, layout: ParallelLayout, *_: Any, **__: Any) -> Any:
        seen.append(layout)
        return 0, 0

    monkeypatch.setattr(rewrite, "reshard", reshard)
    checkpoint = str(save(resolve("nam56r_tiny", ["world=4"])))
    _run("checkpoint", "reshard", checkpoint, "out", "--layout", text)
    assert seen == [ParallelLayout.parse(TEXTS[text])]
    assert seen[0].describe() in capsys.readouterr().out


def test_layouts_holds_what_was_given_and_searches_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = []
    for words in (["tp=1", "pp=2"], ["--layout", "tp=1,pp=2"]):
        _run("layouts", *TINY, *words, "--world-size", "4", "--json")
        found.append(json.loads(capsys.readouterr().out)["layouts"])
    assert found[0] == found[1]
    places = [ParallelLayout.parse(entry["layout"]) for entry in found[0]]
    assert {(place.tp, place.pp) for place in places} == {(1, 2)}
    assert len({place.ep for place in places}) > 1


def test_a_recipe_that_was_written_out_is_the_recipe(tmp_path: Path) -> None:
    """Its file gives every degree, SP too, and none of them counts as typed."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(resolve("nam56r_tiny").to_mapping()))
    for text, layout in TEXTS.items():
        expected = ParallelLayout.parse(layout)
        assert resolve(str(path), layout=text).layout == expected
        assert resolve("nam56r_tiny", layout=text).layout == expected


def test_sp_follows_tp_where_it_goes_to_one_or_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("pattern: AM\ntp: 2\nsp: false\n")
    for typed, sp in (("tp=4", False), ("tp=1", False), ("tp=4,sp=true", True)):
        assert resolve(str(path), layout=typed).layout.sp is sp
    path.write_text("pattern: AM\ntp: 1\nsp: false\n")
    assert resolve(str(path), layout="tp=2").layout.sp
