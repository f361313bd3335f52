"""SIGTERM asks a run to stop: the step is finished, a checkpoint saved, the exit code is 0.

Slurm sends it before it takes a node away, and so do container engines and torchrun.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_asked = threading.Event()


def listen() -> None:
    """From now on, note SIGTERM for :func:`stop_asked` instead of ending; safe to call again.

    Only the main thread can do so; in others nothing changes.
    """
    if threading.current_thread() is threading.main_thread():
        # Megatron's inference coordinator registers stacks on both, which look like a crash.
        faulthandler.unregister(signal.SIGTERM)
        faulthandler.unregister(signal.SIGINT)
        signal.signal(signal.SIGTERM, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _asked.set()


def stop_asked() -> bool:
    """Say whether SIGTERM has reached this process."""
    return _asked.is_set()


@contextlib.contextmanager
def passed_on() -> Iterator[threading.Event]:
    """Pass SIGTERM on to the processes started inside, and wait for them as if nothing had been.

    torch's launcher would kill them after 30 seconds, and end with an error in any case.

    Yields:
        An event that is set once there was a signal.
    """
    import psutil

    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        children = psutil.Process().children()
        came.set()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        if not children:
            sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, previous)
