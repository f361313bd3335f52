"""The wheel, in an environment that has what it declares to need and nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves files beside its sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "nemo_megacpp", source / "nemo_megacpp", ignore=ignore)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = {
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "*.json", "py.typed")
        for path in (ROOT / "nemo_megacpp").rglob(pattern)
    }
    assert names == tracked


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel and, as links, the distributions that it requires."""
    root = tmp_path_factory.mktemp("clean")
    venv.create(root, symlinks=True)
    python = root / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--quiet", str(wheel)], check=True, capture_output=True)
    (packages,) = (root / "lib").glob("python*/site-packages")
    for name in _required("nemo-megacpp"):
        files = importlib.metadata.files(name) or ()
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (packages / top).symlink_to(importlib.metadata.distribution(name).locate_file(top))
    return root


def _required(name: str) -> set[str]:
    """Return what a distribution requires without an extra, and what that requires."""
    found = set()
    for line in importlib.metadata.requires(name) or ():
        if "extra ==" not in line:
            required = re.split(r"[^\w.-]", line)[0]
            found |= {required, *_required(required)}
    return found


def _run(clean: Path, *words: str) -> tuple[int, str, str]:
    command = [str(clean / "bin" / "nemo-megacpp"), *words]
    done = subprocess.run(command, cwd=clean, capture_output=True, text=True, env={}, check=False)
    return done.returncode, done.stdout, done.stderr


def test_doctor_in_a_clean_environment(clean: Path) -> None:
    code, out, err = _run(clean, "doctor", "--json")
    assert (code, err) == (1, "")
    report = json.loads(out)
    assert not report["usable"]
    found = {finding["part"]: finding for finding in report["findings"]}
    broken = {part for part, finding in found.items() if finding["status"] == "broken"}
    assert broken == {"torch", "megatron-core", "einops"}
    assert "nemo_megacpp[core]" in found["megatron-core"]["cost"]
    code, out, err = _run(clean, "doctor", "nam56r_tiny")
    assert (code, err) == (1, "")
    assert "cannot train until this is fixed: torch, megatron-core, einops" in out


def test_what_needs_the_stack_says_so(clean: Path) -> None:
    assert _run(clean, "--version") == (0, "nemo-megacpp 0.1.0\n", "")
    code, out, _ = _run(clean, "recipes")
    assert code == 0 and "nam56r_tiny_mamba3" in out
    for words in (["train", "nam56r_tiny"], ["plan", "nam56r"], ["verify", "nam56r_tiny"]):
        code, out, err = _run(clean, *words)
        assert (code, out) == (2, ""), words
        assert re.fullmatch(
            r"nemo-megacpp: No module named '\w+'; see nemo-megacpp doctor\.\n", err
        )
