"""``nemo-megacpp completion``: what a shell offers."""

from __future__ import annotations

import subprocess

import pytest

from nemo_megacpp.cli import COMMANDS, read_arguments
from nemo_megacpp.recipes.catalog import CATALOG


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> str:
    args = read_arguments(["completion", "bash"])
    assert args.run(args) == 0
    return capsys.readouterr().out


def _offered(script: str, *words: str) -> list[str]:
    """Return what bash offers for the last of ``words``."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _nemo_megacpp"
    command = ["bash", "-c", f"{script}\n{ask}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.processes
def test_bash_completes_commands_recipes_settings_and_options(script: str) -> None:
    assert len(_offered(script, "nemo-megacpp", "")) == len(COMMANDS)
    assert _offered(script, "nemo-megacpp", "tr") == ["train"]
    assert _offered(script, "nemo-megacpp", "plan", "nam56r_t") == [
        name for name in CATALOG if name.startswith("nam56r_t")
    ]
    assert _offered(script, "nemo-megacpp", "train", "nam56r", "lr_w") == [
        *("lr_warmup_init=", "lr_warmup_iters=", "lr_warmup_steps="),
        *("lr_wsd_decay_iters=", "lr_wsd_decay_steps=", "lr_wsd_decay_style="),
    ]
    assert _offered(script, "nemo-megacpp", "train", "nam56r", "wandb_p") == ["wandb_project="]
    assert _offered(script, "nemo-megacpp", "train", "nam56r", "--d") == ["--dry-run"]
    assert _offered(script, "nemo-megacpp", "checkpoint", "resh") == ["reshard"]
    assert "cuda" in _offered(script, "nemo-megacpp", "megatron-args", "nam56r", "c")
    assert _offered(script, "nemo-megacpp", "train", "nam56r", "data=da") == [], "then a file"


def test_zsh_gets_the_same_words(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = read_arguments(["completion", "zsh"])
    assert args.run(args) == 0
    lines = capsys.readouterr().out.splitlines()
    cases = [line for line in script.splitlines() if " offered=(" in line and ";;" in line]
    assert len(cases) == len(COMMANDS)
    assert [line for line in lines if ";;" in line] == cases
    assert lines[-1] == "compdef _nemo_megacpp nemo-megacpp"
