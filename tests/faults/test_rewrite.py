"""``checkpoint reshard``, ``import`` and ``export``: killed at any moment, and on a full disk."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nemo_megacpp.checkpoint.export import export
from nemo_megacpp.checkpoint.folder import saved_checkpoints
from nemo_megacpp.checkpoint.identity import write_identity
from nemo_megacpp.checkpoint.manifest import FILE, check_manifest, write_manifest
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.scratch import scratch_folder
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import save_initial_weights

_MARK = "NEMO_MEGACPP_TEST_REWRITE"
_SPEC = StepSpec(tiny_model("AEMR", vocab_size=16384), dtype="float32")
_PATIENCE = 300.0


@pytest.fixture(scope="module")
def source(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 4 MB; only read it."""
    folder = tmp_path_factory.mktemp("rewrite") / "step=20"
    (folder / "weights").mkdir(parents=True)
    ranks.run(1, save_initial_weights, _SPEC, ParallelLayout.parse("tp=1"), str(folder / "weights"))
    identity = {"model": {**_SPEC.model, "num_layers": 4}, "layout": "tp=1", "tokenizer": None}
    write_identity(folder, {**identity, "manifest": FILE}, 20)
    write_manifest(folder)
    return folder


class _Command:
    """``nemo-megacpp checkpoint …`` with a temporary directory of its own."""

    def __init__(self, temporary: Path, *words: object):
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, _MARK: self.mark, "TMPDIR": str(temporary)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nemo_megacpp.cli", "checkpoint", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )

    def end(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=_PATIENCE)
        return self.process.returncode, out

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            zombie = process.status() == psutil.STATUS_ZOMBIE
            return not zombie and process.environ().get(_MARK) == self.mark
        except psutil.Error:
            return False


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def _words(command: str, source: Path, out: Path) -> list[object]:
    layout = ["--layout", "tp=2,etp=1"] if command == "reshard" else []
    return [command, source, out, *layout]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="Linux's parent-death signal")
@pytest.mark.parametrize("command", ["reshard", "export"])
def test_kill_9_leaves_no_process_and_the_next_start_no_folder(
    command: str, source: Path, temporary: Path, tmp_path: Path
) -> None:
    """At moments from the first import to the last file."""
    moments, out = random.Random(13), tmp_path / "out"
    began = time.monotonic()
    code, told = _Command(temporary, *_words(command, source, tmp_path / "first")).end()
    seconds = time.monotonic() - began
    assert code == 0, told
    assert not any(temporary.iterdir())
    met = 0
    for strike in range(4):
        one = _Command(temporary, *_words(command, source, out))
        moment = 0.9 * seconds * (strike + moments.random()) / 4
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(moment)
        met += one.process.poll() is None
        one.process.send_signal(signal.SIGKILL)
        one.process.communicate()
        give_up = time.monotonic() + 10
        while (left := one.processes()) and time.monotonic() < give_up:
            time.sleep(0.05)
        assert not left, f"after {moment:.1f} of {seconds:.1f} s: {left}"
        if out.exists():  # the machine was faster than before
            assert "contents verified" in check_manifest(out)
            shutil.rmtree(out)
        assert {found.path.name for found in saved_checkpoints(tmp_path)} <= {"first"}
    assert met
    code, told = _Command(temporary, *_words(command, source, out)).end()
    assert code == 0, told
    assert "contents verified" in check_manifest(out)
    assert not any(temporary.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"tmp", "first", "out"}
    assert "contents verified" in check_manifest(source)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a disk of so many KiB; where that is not allowed, skip."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: int) -> Path:
        how = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
        if subprocess.run(how, capture_output=True, check=False).returncode:
            pytest.skip("tmpfs may not be mounted here")
        return disk

    yield mount
    subprocess.run(["umount", "-l", str(disk)], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("command", ["reshard", "import", "export"])
@pytest.mark.parametrize("size", [8, 2048])
def test_a_full_disk_is_one_message(
    command: str,
    size: int,
    source: Path,
    temporary: Path,
    tmp_path: Path,
    small_disk: Callable[[int], Path],
) -> None:
    if command == "import":
        exported = tmp_path / "exported"
        export(source, exported)
    disk = small_disk(size)
    out = disk / "out"
    start = exported if command == "import" else source
    code, told = _Command(temporary, *_words(command, start, out)).end()
    lines = told.splitlines()
    assert code == 2, told
    assert "Traceback" not in told
    assert len(lines) == 2 and "contents verified" in lines[0], told
    assert str(out) in lines[1] and ".partial" not in lines[1], lines[1]
    assert not any(disk.iterdir())
    assert not any(temporary.iterdir())
    assert "contents verified" in check_manifest(source)


@pytest.mark.parametrize("moment", ["inside", "while it is removed"])
def test_a_folder_of_a_killed_process_is_swept(
    moment: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    child = os.fork()
    if child == 0:

        def killed_inside(folder: Path, ignore_errors: bool) -> None:
            for path in folder.iterdir():
                path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(shutil, "rmtree", killed_inside)
        with scratch_folder() as folder:
            (folder / "file").touch()
            if moment == "inside":
                os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = temporary.iterdir()
    assert (left / "file").exists() == (moment == "inside")
    with scratch_folder() as mine:
        assert not left.exists()
        with scratch_folder() as other:
            assert mine.is_dir() and other.is_dir(), "both owners live"
    assert not any(temporary.iterdir())


def test_a_folder_that_was_never_locked_is_removed_after_a_minute(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    old, young = temporary / ".nmcpp-old", temporary / ".nmcpp-young"
    old.mkdir()
    young.mkdir()  # its owner may be about to lock it
    hour_ago = time.time() - 3600
    os.utime(old, (hour_ago, hour_ago))
    with scratch_folder():
        assert not old.exists() and young.is_dir()
