"""The set-up of the Makefile: its steps, and what its pip commands bring from an index alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12")


class Environment(NamedTuple):
    """One that make sets up.

    Attributes:
        target: of make.
        folder, python: make's variables of its folder and of the Python that it is made with.
        pins: the file of its pinned packages.
        pythons: versions of Python that the pins are for.
        refusal: of another Python.
        whole: every package that a pinned one names is pinned.
    """

    target: str
    folder: str
    python: str
    pins: str
    pythons: tuple[str, ...]
    refusal: str
    whole: bool = True


DEFAULT = Environment(
    "install", "VENV", "PYTHON", "requirements-cpu.txt", PYTHONS, "are for Python 3.11 and 3.12"
)
CORE_NEW = Environment(
    "core-new",
    "CORE_NEW",
    "PYTHON312",
    "requirements-core-new.txt",
    ("3.12",),
    "newest Megatron-Core is tested on Python 3.12",
)
BRIDGE = Environment(
    "bridge",
    "BRIDGE",
    "PYTHON312",
    "requirements-bridge.txt",
    ("3.12",),
    "Megatron-Bridge needs Python 3.12",
    whole=False,  # the no-GPU host stands in for some, and others are never imported
)
ENVIRONMENTS = [DEFAULT, CORE_NEW, BRIDGE]
each_environment = pytest.mark.parametrize("made", ENVIRONMENTS, ids=lambda made: made.target)

OF_BRIDGE = {"megatron-core", "transformers", "huggingface-hub", "nvidia-modelopt", "wandb"}
"""What Bridge's environment may have in another version than the default one, as Bridge asks."""
TORCH_CUDA = {"cuda-toolkit", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "triton"}


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pinned(made: Environment = DEFAULT) -> dict[str, Version]:
    """Return the pinned versions by normalized name."""
    lines = (ROOT / made.pins).read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {_name(name): Version(pin) for name, pin in pins}


def _make(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make in the checkout, not as a part of the make that runs the tests."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TORCH_INDEX_URL", "PYTHON", "PYTHON312")
    }
    return subprocess.run(
        ["make", *words],
        cwd=ROOT,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


STUB = """#!/bin/sh
# Stands in for python: makes an environment that holds itself, notes what it is asked for.
case "$*" in
  "-c "*) exit "${WRONG_PYTHON:-0}" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *) echo "$*" >> "$LOG"
     case "$*" in *"$FAIL_AT") exit 1 ;; esac ;;
esac
"""


def _make_words(made: Environment, folder: Path) -> tuple[str, ...]:
    """Return the words that make this environment in a folder, with a stub for Python."""
    stub = folder / "python"
    stub.write_text(STUB, encoding="utf-8")
    stub.chmod(0o755)
    return made.target, f"{made.python}={stub}", f"{made.folder}={folder / 'venv'}"


@each_environment
def test_an_interrupted_setup_begins_again_and_a_finished_one_is_reused(
    made: Environment, tmp_path: Path
) -> None:
    environment, log = tmp_path / "venv", tmp_path / "log"
    words = _make_words(made, tmp_path)

    broken = _make(*words, LOG=str(log), FAIL_AT=made.pins)
    assert broken.returncode == 2, broken.stdout
    steps = re.findall(r"^== (\d) of (\d): ", broken.stdout, re.MULTILINE)
    assert steps == [("1", "4"), ("2", "4"), ("3", "4")]
    half = environment / "half-installed"
    half.touch()
    done = _make(*words, LOG=str(log), FAIL_AT="nothing")
    assert done.returncode == 0 and not half.exists(), done.stdout

    commands = len(log.read_text(encoding="utf-8").splitlines())
    again = _make(*words, LOG=str(log), FAIL_AT="nothing")
    assert again.returncode == 0 and "pip" not in again.stdout
    assert len(log.read_text(encoding="utf-8").splitlines()) == commands


@each_environment
def test_another_python_is_refused_before_anything_is_removed(
    made: Environment, tmp_path: Path
) -> None:
    environment = tmp_path / "venv"
    environment.mkdir()
    done = _make(*_make_words(made, tmp_path), WRONG_PYTHON="1")
    assert done.returncode == 2
    assert made.refusal in done.stdout
    assert environment.exists()


CHECKS = {
    "nothing": "No broken requirements found.",
    "missing": "megatron-bridge 0.6.2 requires flash-linear-attention, which is not installed.",
    "another": "megatron-bridge 0.6.2 has requirement torch>=2.9, but you have torch 2.8.0.",
}
"""What `pip check` prints."""


@pytest.mark.parametrize("said", CHECKS)
@each_environment
def test_packages_that_do_not_go_together_end_the_setup(
    made: Environment, said: str, tmp_path: Path
) -> None:
    """A package in a version that another one does not take, and, in a whole set, a missing one."""
    words = _make_words(made, tmp_path)
    check = (
        f'case "$*" in "-m pip check") echo "{CHECKS[said]}"; exit {int(said != "nothing")} ;; esac'
    )
    stub = tmp_path / "python"
    stub.write_text(f"{STUB}{check}\n", encoding="utf-8")
    done = _make(*words, LOG=str(tmp_path / "log"), FAIL_AT="nothing")
    accepted = said == "nothing" or (said == "missing" and not made.whole)
    assert (done.returncode == 0) == accepted, done.stdout


def test_bridges_environment_shares_the_versions_of_the_default_one() -> None:
    """But for those that it is there for; ``tests/core/test_releases.py`` has core-new's."""
    pinned, default = _pinned(BRIDGE), _pinned()
    other = {name for name in pinned.keys() & default.keys() if pinned[name] != default[name]}
    assert {"megatron-core", "transformers"} <= other <= OF_BRIDGE


def test_this_environment_imports_torch() -> None:
    """What the set-up installed works, and is not only what pip believes to be complete."""
    command = [sys.executable, "-c", "import torch, triton; torch.ones(2).sum()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- what the index has


def _pip(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this environment's pip with an index alone: no configuration, no folder of wheels."""
    clean = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    command = [sys.executable, "-m", "pip", *words, "--disable-pip-version-check"]
    return subprocess.run(
        command,
        env={**os.environ, **clean, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def index() -> None:
    """Skips where a resolution would download gigabytes, or where no index answers."""
    if Version(version("pip")) < Version("23.3"):
        pytest.skip(f"pip {version('pip')} downloads every package that it resolves")
    probe = ("install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "pip")
    done = _pip(*probe, "--retries", "1", "--timeout", "10")
    if done.returncode:
        pytest.skip(f"no package index answers: {done.stderr.strip().splitlines()[-1]}")


def _setup_command(ending: str, *variables: str, target: str = "install") -> list[str]:
    """Return the arguments of the set-up's pip command that ends so, as make would run it."""
    listed = _make("--dry-run", "--always-make", target, *variables)
    assert listed.returncode == 0, listed.stdout
    (line,) = (line for line in listed.stdout.splitlines() if line.endswith(ending))
    return shlex.split(line)[3:]


def _torch_command(*variables: str) -> list[str]:
    """Return that of torch; pip asks for wheels alone where it resolves for another Python."""
    return [*_setup_command(" torch", *variables), "--only-binary", ":all:"]


def _resolve(command: list[str], python: str, target: Path, **environment: str) -> list[Any]:
    """Return the metadata of what a command of the set-up would install under another Python.

    Where the index has no files of metadata, pip reads them out of the wheels by HTTP ranges.
    """
    aims = ["--python-version", python, "--target", str(target), "--ignore-installed"]
    report = ["--dry-run", "--use-feature", "fast-deps", "--quiet", "--report", "-"]
    done = _pip(*command, *aims, *report, **environment)
    assert done.returncode == 0, done.stderr
    return [entry["metadata"] for entry in json.loads(done.stdout)["install"]]


def _versions(metadata: list[Any]) -> dict[str, Version]:
    return {_name(entry["name"]): Version(entry["version"]) for entry in metadata}


@pytest.mark.slow
@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("python", PYTHONS)
def test_the_build_of_the_index_brings_its_cuda_libraries(python: str, tmp_path: Path) -> None:
    found = _versions(_resolve(_torch_command(), python, tmp_path))
    pinned = _pinned()
    assert found["torch"] == pinned["torch"] and found["torch"].local is None
    assert found.keys() >= TORCH_CUDA
    for name, pin in found.items():
        assert name.startswith(("nvidia-", "cuda-toolkit")) or pin == pinned[name], name


@pytest.fixture(scope="module")
def cpu_builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with a CPU build of torch: only the metadata, which names no CUDA library."""
    folder = tmp_path_factory.mktemp("index") / "torch"
    folder.mkdir()
    build = f"{_pinned()['torch']}+cpu"
    info = f"torch-{build}.dist-info"
    wheel = folder / f"torch-{build}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {build}\nRequires-Dist: sympy\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("python", PYTHONS)
def test_a_cpu_build_is_taken_where_pip_finds_one(
    python: str, cpu_builds: Path, tmp_path: Path
) -> None:
    """In an index that make hands to pip, or in a folder that pip is configured to search."""
    asked = _torch_command(f"TORCH_INDEX_URL={cpu_builds.parent.as_uri()}")
    by_index = _versions(_resolve(asked, python, tmp_path))
    by_folder = _versions(
        _resolve(_torch_command(), python, tmp_path, PIP_FIND_LINKS=str(cpu_builds))
    )
    assert by_index == by_folder
    assert by_index["torch"].local == "cpu"
    assert by_index.keys() == {"torch", "sympy", "mpmath"}


@pytest.mark.slow
@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(
    ("made", "python"),
    [
        pytest.param(made, python, id=f"{made.target}-{python}")
        for made in ENVIRONMENTS
        for python in made.pythons
    ],
)
def test_the_pinned_set_is_whole_and_consistent(
    made: Environment, python: str, tmp_path: Path
) -> None:
    """Every pin can be installed from the index, and meets what the others require of it."""
    command = _setup_command(f"-r {made.pins}", target=made.target)
    metadata = _resolve(command, python, tmp_path)
    pinned = _pinned(made)
    assert _versions(metadata) == pinned
    assert list(_unmet(metadata, made, python)) == []


def _unmet(metadata: list[Any], made: Environment, python: str) -> Iterator[str]:
    """Yield the requirements that the pins do not meet, torch's CUDA libraries aside, and packages
    that are not pinned where the set is not a whole one."""
    pinned = _pinned(made)
    marks = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    for entry in metadata:
        for line in entry.get("requires_dist", ()):
            wanted = Requirement(line)
            if wanted.marker is not None and not wanted.marker.evaluate(marks):
                continue
            pin = pinned.get(_name(wanted.name))
            if pin is None and (entry["name"] == "torch" or not made.whole):
                continue
            if pin is None or not wanted.specifier.contains(pin, prereleases=True):
                yield f"{entry['name']} wants {line}; pinned: {pin}"
