"""Several processes, interrupts and kills: the result is that of one undisturbed process."""

from __future__ import annotations

import fcntl
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_megacpp.data import prepare as prepare_module
from nemo_megacpp.data import shards
from nemo_megacpp.data.encode import encode
from nemo_megacpp.data.prepare import prepare
from nemo_megacpp.data.prepared import PreparedData
from nemo_megacpp.errors import UserError

OPTIONS: dict[str, Any] = {
    "vocab_size": 300,
    "held_out": 0.3,
    "num_workers": 1,
    "progress": False,
}


# A process of its own, and no fork of this one: the tokenizers here have threads.
KILLED = """
import os, signal, sys
from nemo_megacpp.data import encode, prepare, shards
shards.SHARD_BYTES = 60
batches, calls = encode._batches, []
def kill(*args):
    calls.append(None)
    for batch in batches(*args):
        yield batch
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
encode._batches = kill
prepare.prepare([sys.argv[1]], sys.argv[2], vocab_size=300, held_out=0.3, num_workers=1)
"""


def killed(corpus: Path, out: Path) -> None:
    """Prepare in a process that is killed amid the third shard."""
    command = [sys.executable, "-c", KILLED, str(corpus), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 60)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards that this process encodes, by number."""
    numbers: list[int] = []

    def spy(*options: Any) -> None:
        numbers.append(options[-1].number)
        encode(*options)

    monkeypatch.setattr(prepare_module, "encode", spy)
    return numbers


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.processes
def test_two_workers_give_the_same_files(
    corpus: Path, prepared: PreparedData, tmp_path: Path
) -> None:
    prepare([corpus], tmp_path / "out", **OPTIONS | {"num_workers": 2})
    assert files(tmp_path / "out") == files(prepared.root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.processes
def test_killed_midway_goes_on(
    corpus: Path,
    prepared: PreparedData,
    tmp_path: Path,
    encoded: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    killed(corpus, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", ".out.partial"]
    with pytest.raises(UserError, match="is not prepared data"):
        PreparedData.open(tmp_path / ".out.partial")
    with pytest.raises(UserError, match="does not exist"):
        PreparedData.open(out)

    prepare([corpus], out, **OPTIONS)
    assert "Resuming an interrupted preparation: 2 of " in capsys.readouterr().out
    assert encoded[0] == 2  # two shards were there, the third was not whole
    assert files(out) == files(prepared.root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.processes
def test_another_request_starts_clean(
    corpus: Path, prepared: PreparedData, tmp_path: Path, encoded: list[int]
) -> None:
    out = tmp_path / "out"
    killed(corpus, out)
    data = prepare([corpus], out, **OPTIONS | {"vocab_size": 290})
    assert encoded[0] == 0
    assert data.vocab_size == 290
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_interrupt_keeps_what_is_done(
    corpus: Path,
    prepared: PreparedData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "deep" / "out"
    with monkeypatch.context() as patch:

        def interrupted(*options: Any) -> None:
            if options[-1].number == 1:
                raise KeyboardInterrupt
            encode(*options)

        patch.setattr(prepare_module, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], out, **OPTIONS)
    assert "Interrupted. Run the same command to resume" in capsys.readouterr().err
    assert not out.exists()
    prepare([corpus], out, **OPTIONS)
    assert "1 of " in capsys.readouterr().out
    assert files(out) == files(prepared.root)


@pytest.mark.processes
def test_ctrl_c_while_the_tokenizer_is_trained(tmp_path: Path) -> None:
    """The library cannot be interrupted, and trains for long on text without a pattern."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    letters = random.Random(0)
    for number in range(4):
        words = ("".join(letters.choices("abcdefghijklmnop", k=24)) for _ in range(40_000))
        (source / f"{number}.txt").write_text(" ".join(words))
    command = ["data", "prepare", str(source), "--out", str(out), "--vocab-size", "30000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nemo_megacpp.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stage = tmp_path / ".out.partial"
    while process.poll() is None and not (stage / "plan.json").exists():
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    try:
        _, shown = process.communicate(timeout=6)  # the training takes 15 s
    finally:
        process.kill()
    assert process.returncode == 130
    message = f"Interrupted. Run the same command to resume; progress is saved in {stage}.\n"
    assert message in shown and "Traceback" not in shown and "panicked" not in shown
    assert not out.exists()


@pytest.mark.processes
def test_a_damaged_part_is_not_taken_for_whole(corpus: Path, tmp_path: Path) -> None:
    out, stage = tmp_path / "out", tmp_path / ".out.partial"
    killed(corpus, out)
    part = max(stage.glob("parts/00000[01]/*.bin"), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"00000[01]/\w+\.bin has .* bytes; its index says"):
        prepare([corpus], out, **OPTIONS)
    prepare([corpus], out, **OPTIONS)  # the refusal has cleared the stage away


def test_one_process_at_a_time(corpus: Path, tmp_path: Path) -> None:
    stage = tmp_path / ".out.partial"
    stage.mkdir()
    lock = (tmp_path / ".out.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="out' is being prepared by another process"):
        prepare([corpus], tmp_path / "out", **OPTIONS)
    assert stage.exists()
    lock.close()
    prepare([corpus], tmp_path / "out", **OPTIONS)


def test_killed_between_its_two_renames(
    corpus: Path, prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older data lie beside their place; the next preparation puts them back."""
    out = tmp_path / "out"
    shutil.copytree(prepared.root, tmp_path / ".out.replaced")

    def fail(*options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "encode", fail)
    with pytest.raises(UserError, match="No space left on device"):
        prepare([corpus], out, **OPTIONS | {"vocab_size": 290})
    assert files(out) == files(prepared.root)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
