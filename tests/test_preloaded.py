"""A stand-in does what its command would: arguments, folder, environment, pipes, exit code."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest

from .preloaded import preloaded_commands

pytestmark = pytest.mark.processes

_MODULE = """
import multiprocessing, os, signal, sys

def work(pipe):
    pipe.send(pipe.recv() + [sys.modules.get("tests.preloaded") is not None])

if __name__ == "__main__":
    print(sys.argv[1:], os.getcwd(), os.environ["GIVEN"], sys.stdin.read())
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=work, args=(there,))
    child.start()
    here.send([1])
    print(here.recv(), "nemo_megacpp.cli" in sys.modules)
    child.join()
    print("to stderr", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(int(sys.argv[1]))
"""

Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Return a function that runs a shell command where the stand-ins come first."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "shown.py").write_text(_MODULE)
    with preloaded_commands(tmp_path_factory.mktemp("p"), ["nemo_megacpp.cli"]) as stand_ins:
        path = f"{stand_ins}{os.pathsep}{os.environ['PATH']}"

        def run(command: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["bash", "-c", command],
                cwd=folder,
                env={**os.environ, "PATH": path, "GIVEN": "this"},
                capture_output=True,
                text=True,
            )

        yield run


def test_a_module(shell: Shell) -> None:
    """What it spawns is real, since that may look for its parent."""
    done = shell("echo hello | python -m shown 3 'a b'")
    assert done.returncode == 3 and done.stderr == "to stderr\n", done
    said, spawned = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert said.startswith("['3', 'a b'] ") and "this hello" in said
    assert spawned == "[1, False] True"


def test_a_signal(shell: Shell) -> None:
    assert shell("exec python -m shown die < /dev/null").returncode == -signal.SIGTERM


def test_our_command(shell: Shell) -> None:
    """Its output goes through the shell's pipe, and its exit code is seen."""
    assert shell("nemo-megacpp recipes | grep -c nam56r_tiny").stdout.strip() != "0"
    done = shell("nemo-megacpp train nam56r_tinny")
    assert (done.returncode, done.stdout) == (2, "") and "nam56r_tinny" in done.stderr


def test_plain_python_is_itself(shell: Shell) -> None:
    assert shell("python -c 'print(6 * 7)'").stdout == "42\n"
