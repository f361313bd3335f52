"""Commands run in forks of one process that has imported the libraries.

Importing torch, Megatron-Core and NeMo costs every command, and every rank that it starts, several
seconds of processor time. :func:`preloaded_commands` starts a process that has imported them, and
writes stand-ins for ``nemo-megacpp``, ``nemo`` and ``python``. Put first on ``PATH``, they run the
same code in a fork of that process, with the caller's arguments, folder, environment, open files
and exit code. So do the ranks that such a command starts with ``sys.executable -m`` or spawns; what
a rank starts is real.

A test of start-up, of processes or of signals runs the real command.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent
NAMES = ("nemo-megacpp", "nemo", "python")
# Not what a command runs as __main__, which would then be there twice.
MODULES = (
    "nemo_run.__main__",
    "nemo_megacpp.cli",
    "nemo_megacpp.recipes.factories",
    "nemo_megacpp.recipes.nemo.build",
    "nemo_megacpp.checkpoint.commands",
    "nemo_megacpp.checkpoint.rewrite",
    "nemo_megacpp.proof.verify",
    "nemo_megacpp.recipes.verify",
)
_PATIENCE = 600.0
"""Seconds to import, on a busy machine."""
_FREE = 512
"""Number of a file descriptor above those that a command has open."""

# Hands everything it was given to the server, and ends as the fork does.
_STAND_IN = """#!{python} -IS
import array, json, os, signal, socket, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "python" and words[:1] != ["-m"] and words[-1:] != ["--multiprocessing-fork"]:
    os.execv({python!r}, [{python!r}, *words])
files = []
for number in map(int, os.listdir("/proc/self/fd")):
    try:
        if number < 3 or os.get_inheritable(number):
            files.append(number)
    except OSError:
        pass
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([name, words, os.getcwd(), dict(os.environ), files]).encode()
rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
server.sendmsg([b"%20d" % len(request)], [rights])
server.sendall(request)
code = int(server.makefile().readline() or 70)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextlib.contextmanager
def preloaded_commands(folder: Path, modules: Sequence[str] = MODULES) -> Iterator[Path]:
    """Start the process; end it, and what still runs in its forks, at the end.

    Args:
        folder: an empty one, for the stand-ins and the socket that they connect to.
        modules: what the process imports.

    Yields:
        The folder of the stand-ins.
    """
    address, stand_ins = folder / "socket", folder / "bin"
    stand_ins.mkdir()
    for name in NAMES:
        script = stand_ins / name
        script.write_text(_STAND_IN.format(python=sys.executable, address=str(address)))
        script.chmod(0o755)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    settings = {
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # the other way would spoil CUDA for forks
    }
    log = folder / "log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.preloaded", str(stand_ins), *modules],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,  # its end ends the server
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        give_up = time.monotonic() + _PATIENCE
        while not address.exists():
            assert server.poll() is None and time.monotonic() < give_up, log.read_text()
            time.sleep(0.05)
        yield stand_ins
    finally:
        server.communicate()


def _serve(stand_ins: Path, modules: Sequence[str]) -> None:
    """Import the libraries, then fork for every connection until standard input ends."""
    for module in modules:
        importlib.import_module(module)
    address = stand_ins.parent / "socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen()
    os.rename(f"{address}.new", address)
    attending: set[int] = set()
    while sys.stdin not in select.select([listener, sys.stdin], [], [], 1.0)[0]:
        attending = {pid for pid in attending if os.waitpid(pid, os.WNOHANG) == (0, 0)}
        if not select.select([listener], [], [], 0)[0]:
            continue
        connection, _ = listener.accept()
        pid = os.fork()
        if pid == 0:
            listener.close()
            _attend(connection, stand_ins)
        attending.add(pid)
        connection.close()
    for pid in attending:
        os.kill(pid, signal.SIGTERM)


def _attend(connection: socket.socket, stand_ins: Path) -> None:
    """Fork the command and tell its stand-in how it ends; kill it if the stand-in is killed."""
    name, words, folder, environment, files = _receive(connection)
    signal.signal(signal.SIGTERM, lambda *_: connection.shutdown(socket.SHUT_RDWR))
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setpgrp()
            connection.close()
            os.close(0)
            for number, held in files.items():
                os.dup2(held, number)
                os.close(held)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            code = _run(name, words, stand_ins)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    for held in files.values():
        os.close(held)
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if select.select([connection], [], [], 0.01)[0]:
            os.killpg(child, signal.SIGKILL)
            os._exit(0)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(ended[1]))
    os._exit(0)


def _receive(connection: socket.socket) -> tuple[str, list[str], str, dict[str, str], dict]:
    size, held, _, _ = socket.recv_fds(connection, 20, 200)
    request = b""
    while len(request) < int(size):
        request += connection.recv(int(size) - len(request))
    *rest, files = json.loads(request)
    # Out of the way of the numbers that they are to get.
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _FREE) for descriptor in held]
    for descriptor in held:
        os.close(descriptor)
    return *rest, dict(zip(files, moved, strict=True))


def _run(name: str, words: list[str], stand_ins: Path) -> int:
    """Do in this process what the real command would; return its exit code."""
    from multiprocessing import spawn

    if name != "python":  # a rank's helpers know it by its process id, and are real
        sys.executable = str(stand_ins / "python")
        spawn.set_executable(sys.executable)
    sys.stdout.reconfigure(line_buffering=True)
    try:
        if name != "python":
            sys.argv = [str(SCRIPTS / name), *words]
            sys.path[0] = str(SCRIPTS)
            runpy.run_path(sys.argv[0], run_name="__main__")
        elif words[0] == "-m":
            sys.argv = words[1:]
            sys.path[0] = os.getcwd()
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:  # … -c "from multiprocessing.spawn import spawn_main; …" --multiprocessing-fork
            sys.argv = ["-c", words[-1]]
            code: dict[str, Any] = {"__name__": "__main__"}
            exec(words[words.index("-c") + 1], code)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    finally:
        import multiprocessing

        for started in multiprocessing.active_children():
            if not started.daemon:
                started.join()
    return 0


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2:])
