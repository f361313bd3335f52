"""End child processes with their parent, however that ends.

A rank that saves a checkpoint has helpers: forked writers, and a spawned server for their results.
They would outlive a rank that is killed, the server forever. Linux can kill a process with its
parent; on other systems nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import sys
import threading
from importlib import import_module
from multiprocessing import get_context, resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None

_forking: tuple[int, bool] = (0, False)
"""The process that forks and whether its main thread does: PDEATHSIG is bound to the thread."""
_bound = False
_server: SyncManager | None = None


def end_with_parent(parent: int | None = None) -> None:
    """Have this process killed when its parent ends.

    Args:
        parent: process id of the parent, if known: this process is then killed as well if the
            parent has ended already.
    """
    if _libc is None:
        return
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def call_bound(owner: int, module: str, function: str, *args: Any) -> None:
    """Call a function in a spawned process that ends with its owner.

    The process is bound before it imports the function's module, which may take as long as torch.

    Args:
        owner: process id of the owner; 0: started by a thread, whose end is not the owner's.
        module, function: names of what is called with ``args``.
    """
    if owner:
        end_with_parent(owner)
    getattr(import_module(module), function)(*args)


def bind_helpers() -> None:
    """Make the helpers that this process starts for saving end with it; repeats do nothing.

    Forked processes end with it. The server that Megatron's writers report to is started here,
    before Megatron would start one at the first save: this one ends with the process, and ignores
    a SIGTERM to the process group, so that a rank that is asked to stop can still save.
    """
    global _bound
    if _bound:
        return
    _bound = True
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
    _start_results_server()


def _before_fork() -> None:
    global _forking
    _forking = os.getpid(), threading.current_thread() is threading.main_thread()


def _after_fork() -> None:
    parent, by_main_thread = _forking
    if by_main_thread:
        end_with_parent(parent)


def renew_results_queue() -> Any:
    """Give the writers forked next a new queue on the server of :func:`bind_helpers`: a save that
    failed may have left its results in the old one.

    Returns:
        The queue. The process that made it must keep this object while another one uses the queue.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    assert _server is not None, "bind_helpers() starts it"
    filesystem_async._results_queue = queue = _server.Queue()  # type: ignore[attr-defined]
    return queue


def _start_results_server() -> None:
    global _server
    # Linux's abstract sockets leave no file behind; elsewhere multiprocessing chooses.
    address = f"\0nemo-megacpp-{secrets.token_hex(8)}" if sys.platform == "linux" else None
    server = SyncManager(address, ctx=get_context("spawn"))
    resource_tracker.ensure_running()  # it would unblock the signal below
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the server inherits it
    try:
        server.start(_serve, (os.getpid(),))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    _server = server
    renew_results_queue()


def _serve(owner: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(owner)
