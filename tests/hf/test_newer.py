"""The newest transformers, in the environment of Megatron-Bridge (`make bridge`): the form with
modelling code, and the native form of ``nemotron_h``, which the default environment's lacks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_megacpp.hf.export import export_hf
from nemo_megacpp.hf.nemotron_h import export_nemotron_h
from tests.bridge.environment import ROOT, bridge_python
from tests.hf.cases import CASES, NATIVE
from tests.hf.models import LOGITS

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def test_the_newest_transformers(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Logits, steps and generation of every case, to 1e-10."""
    words, names = [], []
    for write, cases in ((export_hf, CASES), (export_nemotron_h, NATIVE)):
        for name in cases:
            out = tmp_path / f"{len(words)}"
            write(saved(name), out)
            words += [str(out), str(saved(name).parent / LOGITS)]
            names.append((write.__name__, name))
    told = _run(words, tmp_path)
    for name, found in zip(names, told["found"], strict=True):
        native = name[0] == "export_nemotron_h"
        assert found["class"] == ("NemotronHForCausalLM" if native else "NemoMegacppForCausalLM")
        assert found["logits"] < 1e-10, (name, found)
        assert found["steps"] < 1e-10, (name, found)
        assert found["generates"], (name, found)


def _run(words: list[str], folder: Path) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [str(bridge_python()), "-W", "ignore", "-m", "tests.hf.newer", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told
