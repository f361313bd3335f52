"""The no-GPU host tells the truth about CUDA; and the house's rooms import in one direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import nemo_megacpp

ROOT = Path(nemo_megacpp.__file__).parent

ROOMS = (
    "values",
    "pattern",
    "layout",
    "families",
    "settings",
    "config",
    "mixers",
    "specs",
    "runtime",
    "checkpoint",
    "contract",
    "proof",
    "data",
    "recipes",
    "cli",
)
"""A room imports from those before it."""


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="a host with a GPU is left as it is")
def test_ensure_host_twice() -> None:
    """In a process of its own: the second call wraps nothing once more, and nobody is lied to."""
    code = """
import torch
from nemo_megacpp.runtime.host import Host, current_host, ensure_host
assert current_host() == Host("cpu", "gloo")
assert ensure_host() == Host("cpu", "gloo")
import megatron.core.tensor_parallel.mappings as mappings
names = lambda: [torch.zeros, torch.Tensor.to, torch.Tensor.cuda, torch.cuda.Stream,
                 mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim]
once = names()
assert ensure_host() == Host("cpu", "gloo")
assert all(a is b for a, b in zip(once, names(), strict=True)), "wrapped twice"
assert not torch.cuda.is_available()
for tensor in (
    torch.zeros(3, device="cuda"),
    torch.zeros(3, device=torch.device("cuda", 0)),
    torch.empty(3, pin_memory=True),
    torch.ones(3).new_zeros(3, device="cuda"),
    torch.ones(3).to("cuda"),
    torch.ones(3).to(device="cuda:0", dtype=torch.float64),
    torch.ones(3).cuda(),
):
    assert tensor.device.type == "cpu"
assert torch.ones(3).to(device="cuda", dtype=torch.float64).dtype == torch.float64
assert torch.ones(3).to(torch.float64).dtype == torch.float64
torch.cuda.manual_seed(5)
state = torch.cuda.get_rng_state()
first = torch.rand(4)
torch.cuda.set_rng_state(state)
assert torch.equal(first, torch.rand(4))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _imports(path: Path) -> Iterator[str]:
    """Yield every module of this package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in names if name != "nemo_megacpp.__version__"]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "nemo_megacpp")


def _all_imports() -> list[tuple[Path, str]]:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 40
    return [(path.relative_to(ROOT), name) for path in files for name in _imports(path)]


def test_only_the_runtime_knows_the_stand_ins() -> None:
    stand_ins = {"cpu_torch", "cpu_megatron", "cpu_nemo", "cpu_scripts"}
    users = {path for path, name in _all_imports() if stand_ins & set(name.split("."))}
    assert users, "the scan must see the import in runtime/host.py"
    assert {path.parts[0] for path in users} == {"runtime"}


def test_rooms_import_downwards() -> None:
    """Each room from those before it, without exception."""
    known = {*ROOMS, "errors"}
    upwards = []
    for path, name in _all_imports():
        room, target = Path(path.parts[0]).stem, (*name.split("."), "")[1]
        if room in ("__init__", "errors") or target in ("", "errors"):
            continue
        assert room in known and target in known, f"{path} imports {name}: no such room"
        if ROOMS.index(target) > ROOMS.index(room):
            upwards.append(f"{path} imports {name}")
    assert not upwards
