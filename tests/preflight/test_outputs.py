"""Loggers and profiles that are refused before a run writes anything."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from nemo_megacpp.errors import UserError
from nemo_megacpp.preflight.outputs import validate_profile, validate_wandb_login
from nemo_megacpp.recipes.recipe import resolve

KEY = "0" * 40
NETRC = f"machine api.wandb.ai\n  login user\n  password {KEY}\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and a working directory, where nothing is known of W&B."""
    for name in os.environ:
        if name.startswith(("WANDB", "NETRC")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_wandb_without_a_login_is_refused(home: Path) -> None:
    before = psutil.Process().children()
    with pytest.raises(UserError, match=r"Weights & Biases is not logged in\. Run 'wandb login'"):
        validate_wandb_login(resolve("nam56r_tiny", ["wandb_project=p"]))
    assert psutil.Process().children() == before, "W&B's service does not stay"
    assert "WANDB_SERVICE" not in os.environ
    assert {path.name for path in home.iterdir()} <= {".cache"}, "its own, in its home"


@pytest.mark.parametrize(
    ("environment", "files"),
    [
        ({"WANDB_MODE": "offline"}, {}),
        ({"WANDB_MODE": "disabled"}, {}),
        ({"WANDB_API_KEY": KEY}, {}),
        ({"RANK": "1", "WORLD_SIZE": "2"}, {}),  # rank 0 is the one that logs
        ({}, {".netrc": NETRC}),
        ({}, {"wandb/settings": "[default]\nmode = offline\n"}),  # of 'wandb offline'
    ],
)
def test_wandb_with_a_login_or_offline_is_accepted(
    environment: dict[str, str],
    files: dict[str, str],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text)
    validate_wandb_login(resolve("nam56r_tiny", ["wandb_project=p"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("profile_step_start=12", "profile_step_start=12, profile_step_end=12: .* 0 ≤ start"),
        ("profile_step_end=11 max_steps=10", "start < end ≤ 10, the last step"),
        ("stop_after=11", "start < end ≤ 11, the last step"),
        ("profile_ranks=[2]", r"profile_ranks=\[2\]: give each rank once, from 0 to 1"),
        ("profile_ranks=[0,0]", "give each rank once"),
        ("profile_ranks=[]", "give each rank once"),
    ],
)
def test_a_profile_outside_the_run_is_refused(settings: str, message: str) -> None:
    words = settings.split()
    validate_profile(resolve("nam56r_tiny", words))  # switched off
    with pytest.raises(UserError, match=message):
        validate_profile(resolve("nam56r_tiny", ["use_pytorch_profiler=true", *words]))


def test_a_profile_inside_the_run_is_accepted() -> None:
    words = ["use_pytorch_profiler=true", "profile_step_start=0", "profile_step_end=2"]
    validate_profile(resolve("nam56r_tiny", [*words, "max_steps=2", "profile_ranks=[1]"]))
