"""The environment with Megatron-Bridge (`make bridge`), used from the default one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-bridge" / "bin" / "python"
_MAIN = "from nemo_megacpp.cli import main; main()"


def bridge_python() -> Path:
    """Return its Python; skips the test where there is none."""
    if not PYTHON.exists():
        pytest.skip("Megatron-Bridge's environment is not set up: make bridge")
    return PYTHON


def command(python: str | Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``nemo-megacpp`` with a Python, on this checkout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        env.pop(name, None)
    return subprocess.run(
        [str(python), "-W", "ignore", "-c", _MAIN, *map(str, arguments)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
