"""SIGTERM asks a run to stop: the step is finished, a checkpoint saved, the exit code is 0.

Slurm sends it before it takes a node away, and so do container engines and torchrun.
"""

from __future__ import annotations

import faulthandler
import signal
import threading

_asked = threading.Event()


def listen() -> None:
    """Note SIGTERM from now on for :func:`stop_asked`, in place of ending the process.

    Only a main thread can; in others the signal keeps its handler.
    """
    if threading.current_thread() is threading.main_thread():
        # Megatron's inference coordinator registers stacks on both, which look like a crash.
        faulthandler.unregister(signal.SIGTERM)
        faulthandler.unregister(signal.SIGINT)
        signal.signal(signal.SIGTERM, lambda *_: _asked.set())


def stop_asked() -> bool:
    """Return whether SIGTERM has reached this process."""
    return _asked.is_set()
