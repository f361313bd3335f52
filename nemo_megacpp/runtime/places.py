"""Where this process stands: Python stack, module, and the collective that it waits in."""

from __future__ import annotations

import contextlib
import linecache
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed

from nemo_megacpp.runtime.rank_errors import innermost_of_user

_TORCH = Path(torch.__file__).parent
_COLLECTIVES = tuple(
    str(_TORCH / "distributed" / name)
    for name in ("distributed_c10d.py", "_functional_collectives.py")
)
_AUTOGRAD = str(_TORCH / "autograd")
_HOST = str(Path(__file__).with_name("cpu_"))
"""Stand-ins of the no-GPU host, which only pass a call on."""
_PASSING_ON = re.compile(
    rf"{re.escape(str(_TORCH))}/|.*/(typing_extensions|contextlib|functools)\.py$"
)
_WAITS = re.compile(r"\.(wait|item|tolist|cpu)\(|\bsynchronize\(")
"""Calls in which a rank waits for the work of its device, and so for the other ranks."""
_WRAPPERS = re.compile(r"^(?:(?:\d+|module)\.)+")
"""What DDP and NeMo's ``MegatronParallel`` put before a module's path."""


class Place(NamedTuple):
    """One entry of a stack."""

    file: str
    line: int
    function: str
    """With its class: ``MambaMixer.forward``."""

    def __str__(self) -> str:
        return f"{self.function} ({self.file}, line {self.line})"


def main_thread_stack() -> list[Place]:
    """Return the stack of the main thread, outermost first.

    During the backward pass of a GPU, autograd's own thread calls the Python functions: its stack
    then follows that of the main thread, which waits for it.
    """
    return [
        Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
        for frame in _main_thread_frames()
    ]


def main_thread_module() -> str:
    """Return the path of the innermost ``torch.nn.Module`` that the main thread is in, or ''.

    It reads the locals of frames, which then keep their tensors: for a process that ends.
    """
    modules = [
        module
        for frame in _main_thread_frames()
        if isinstance(module := frame.f_locals.get("self"), torch.nn.Module)
    ]
    with contextlib.suppress(RuntimeError):  # the thread has gone on, and adds a module
        for name, module in modules[0].named_modules() if modules else ():
            if module is modules[-1]:
                return _WRAPPERS.sub("", name)
    return ""


def _main_thread_frames() -> list[FrameType]:
    stacks = sys._current_frames()
    frames = _frames(stacks.pop(threading.main_thread().ident or 0, None))
    if frames and frames[-1].f_code.co_name == "_engine_run_backward":
        others = [found for top in stacks.values() if (found := _frames(top))]
        frames += next((o for o in others if o[0].f_code.co_filename.startswith(_AUTOGRAD)), [])
    return frames


def _frames(frame: FrameType | None) -> list[FrameType]:
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found[::-1]


def waits(stack: Sequence[Place]) -> bool:
    """Return whether the innermost call waits for other ranks: a collective, or a device."""
    if not stack:
        return False
    if stack[-1].file in _COLLECTIVES:
        return True
    of_user = innermost_of_user([stack[-1]]) is not None
    return not of_user and bool(_WAITS.search(linecache.getline(*stack[-1][:2])))


def describe_place(stack: Sequence[Place], module: str = "") -> str:
    """Return the innermost call, the module it belongs to, and the user's own code before it."""
    stack = [place for place in stack if not place.file.startswith(_HOST)]
    if not stack:
        return "an unknown place"
    inner = next((p for p in reversed(stack) if not _PASSING_ON.match(p.file)), stack[-1])
    text = str(inner) if inner == stack[-1] else f"{stack[-1].function}, called by {inner}"
    user = innermost_of_user(stack)
    if user is not None and user != inner:
        text += f", called by {user}"
    return text + (f", in the module {module}" if module else "")


def format_stack(stack: Sequence[Place]) -> str:
    """Return the stack as Python prints one, outermost call first."""
    lines = []
    for place in stack:
        lines.append(f'  File "{place.file}", line {place.line}, in {place.function}')
        if source := linecache.getline(*place[:2]).strip():
            lines.append(f"    {source}")
    return "\n".join(lines)
