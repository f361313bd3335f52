"""Commands in forks of one process that has imported everything: a try costs its work alone.

A command runs in a session and with a temporary folder of its own, with its output in files, under
limits of time and memory. Ranks that it starts are forks as well.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import types
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nemo_megacpp.errors import UserError

_MEMORY = 4 << 30
"""Bytes that a command may take beyond what is imported."""
_MARK = "NEMO_MEGACPP_TEST_COMMAND"
"""Environment variable by which processes that left the session are known."""
_LINGER = 10.0
"""Seconds for helpers to end once the command has; on a busy machine they may have to wait."""
_RESULT = "result.json"
_STREAMS = {"out": 1, "err": 2}
"""Files of what a command writes, by descriptor."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code, negative for a signal; None where the time limit or a kill ended it.
        out, err: what it wrote.
        seconds: that it took.
        left: processes of it that were still there.
        temporary: names that it left in its temporary folder.
        result: of the function that ran after a command that exited with 0.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    left: tuple[str, ...]
    temporary: tuple[str, ...]
    result: Any = None


class Forks:
    """Starts commands; use as a context manager.

    Args:
        modules: to import beforehand.
        folder: for what commands write; it must exist.
    """

    def __init__(self, modules: Sequence[str], folder: Path):
        import multiprocessing

        self._folder, self._number = folder, 0
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, list(modules)))
        self._process.start()
        there.close()

    def run(
        self,
        arguments: Sequence[object] | None,
        *,
        cwd: Path,
        timeout: float = 60.0,
        file_size: int | None = None,
        then: Callable[..., Any] | None = None,
        given: Sequence[str] = (),
        strike: tuple[float, int, bool] | None = None,
        temporary: Path | None = None,
    ) -> Ended:
        """Run ``nemo-megacpp`` with ``arguments``.

        Args:
            arguments: of the command line; None: only ``then`` is called.
            cwd: folder to run in.
            timeout: seconds until it is killed.
            file_size: most bytes of a file that it may write, for want of a full disk.
            then: what to call in the same process after exit code 0; returns what JSON can hold.
            given: arguments of ``then``.
            strike: after how many seconds to send which signal, and whether its ranks get it, too.
            temporary: its temporary folder; None: one of its own.
        """
        self._number += 1
        place = self._folder / f"command-{self._number}"
        place.mkdir()
        for name in _STREAMS:  # a strike may come before the command has opened them
            (place / name).touch()
        temporary = temporary or place / "tmp"
        temporary.mkdir(exist_ok=True)
        mark = uuid.uuid4().hex
        request = {
            "arguments": None if arguments is None else [str(a) for a in arguments],
            "cwd": str(cwd),
            "place": str(place),
            "temporary": str(temporary),
            "mark": mark,
            "file_size": file_size,
        }
        started = time.monotonic()
        self._pipe.send((request, then, tuple(given)))
        session = self._pipe.recv()
        code: int | None = None
        if strike is not None and not self._pipe.poll(strike[0]):
            with contextlib.suppress(psutil.Error):
                for process in _members(session, mark) if strike[2] else [psutil.Process(session)]:
                    process.send_signal(strike[1])
        if self._pipe.poll(timeout - (time.monotonic() - started)):
            code = self._pipe.recv()
            left = _left_behind(session, mark, _LINGER)
        else:
            _left_behind(session, mark, 0.0)  # ends them
            self._pipe.recv()
            left = []
        seconds = time.monotonic() - started
        result = place / _RESULT
        return Ended(
            code,
            *(_text(place / name) for name in _STREAMS),
            seconds,
            tuple(left),
            tuple(sorted(os.listdir(temporary))),
            json.loads(result.read_text()) if result.exists() else None,
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pipe.close()
        self._process.join(20)
        self._process.kill()


def _text(path: Path) -> str:
    with path.open("rb") as stream:
        return stream.read(1 << 20).decode(errors="replace")


def _left_behind(session: int, mark: str, patience: float) -> list[str]:
    """Return the processes of a command that do not end by themselves; they are killed."""
    give_up = time.monotonic() + patience
    while (left := _members(session, mark)) and time.monotonic() < give_up:
        time.sleep(0.02)
    told = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            told.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
        with contextlib.suppress(psutil.Error):
            process.kill()
    return told


def _members(session: int, mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            own = os.getsid(process.pid) == session or process.environ().get(_MARK) == mark
            if own and not _has_ended(process):
                found.append(process)
    return found


def _has_ended(process: psutil.Process) -> bool:
    """Whether it has closed its files: a process that was killed is a zombie before its last thread
    has ended, and holds its locks until then."""
    return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1


# --- in the process that forks


def _serve(pipe: Any, modules: list[str]) -> None:
    import warnings

    from nemo_megacpp.runtime.imports import importing
    from nemo_megacpp.runtime.orphans import end_with_parent

    end_with_parent()
    sys.modules["__main__"] = types.ModuleType("__main__")  # helpers would import the caller's
    warnings.simplefilter("ignore")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = "1"
    with importing():
        for module in modules:
            importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            request, then, given = pipe.recv()
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            pipe.close()
            _become(request, then, given)
        pipe.send(child)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _become(request: dict[str, Any], then: Callable[..., Any] | None, given: Any) -> None:
    """Run the command in this fork, and end."""
    code = 1
    place = Path(request["place"])
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, number in _STREAMS.items():
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
    os.chdir(request["cwd"])
    os.environ |= {_MARK: request["mark"], "TMPDIR": request["temporary"]}
    tempfile.tempdir = None
    arguments = request["arguments"]
    sys.argv = ["nemo-megacpp", *(arguments or ())]
    try:
        _fork_ranks()
        taken = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY,) * 2)
        if request["file_size"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
        from nemo_megacpp import cli

        try:
            sys.exit(0) if arguments is None else cli.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
        # The command has ended: what follows is the campaign's.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if code == 0 and then is not None:
            (place / _RESULT).write_text(json.dumps(then(*given)))
    except UserError as error:
        print(f"nemo-megacpp: {error}", file=sys.stderr)
        code = 2
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()  # multiprocessing's, among others
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _fork_ranks() -> None:
    """Let the ranks of a command be forks of it: what they import is there already."""
    import multiprocessing

    from nemo_megacpp.runtime import workers

    workers.mp = _ForkedRanks(multiprocessing.get_context("fork"))  # type: ignore[attr-defined]


class _ForkedRanks:
    """Stands for the multiprocessing module in :mod:`nemo_megacpp.runtime.workers`."""

    def __init__(self, context: Any):
        self._context, self._ends = context, []  # type: ignore[var-annotated]

    def get_context(self, _: str) -> _ForkedRanks:
        return self

    def active_children(self) -> Any:
        return self._context.active_children()

    def Pipe(self) -> Any:
        here, there = self._context.Pipe()
        self._ends.append(here)
        return here, there

    def Process(self, target: Callable[..., Any], args: Any) -> Any:
        return self._context.Process(target=_as_rank, args=(self._ends, target, args))


def _as_rank(ends: list[Any], target: Callable[..., Any], args: Any) -> None:
    for end in ends:  # a rank that held them would not see that the command has ended
        end.close()
    target(*args)
