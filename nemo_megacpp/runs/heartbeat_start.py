"""Start a run's heartbeats, before the libraries are imported where the run is ours."""

from __future__ import annotations

import contextlib
from pathlib import Path

from nemo_megacpp.errors import UserError
from nemo_megacpp.runs.events import record_event
from nemo_megacpp.runtime import heartbeat


def start_heartbeats(run_dir: Path, timeout_minutes: float, init_timeout_minutes: float) -> None:
    """Watch this rank from now on; does nothing if it is watched already.

    Args:
        run_dir: the run's folder, which records the end of a stalled run.
        timeout_minutes: ``heartbeat_timeout_minutes`` of the run.
        init_timeout_minutes: ``init_timeout_minutes`` of the run.
    """

    def report(message: str, step: int) -> None:
        with contextlib.suppress(UserError):  # a full disk
            record_event(run_dir, "failed", step, reason=message.splitlines()[0])

    limits = heartbeat.Limits(60 * timeout_minutes, 60 * init_timeout_minutes)
    heartbeat.start(limits, run_dir / "logs", report)
