"""What a process has started ends with it, however it ends; SIGTERM to the group ends nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="Linux's parent-death signal"),
]

_OWNER = """
import os, sys, time
from nemo_megacpp.runtime import stopping
from nemo_megacpp.runtime.orphans import bind_helpers

if __name__ == "__main__":
    stopping.listen()
    bind_helpers()
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    queue = filesystem_async._get_write_results_queue()
    if os.fork() == 0:
        time.sleep(600)
    print("ready", flush=True)
    sys.stdin.readline()
    queue.put(3)
    print(queue.get(), stopping.stop_asked(), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_helpers_outlive_sigterm_and_not_their_owner() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert owner.stdin is not None and owner.stdout is not None
    try:
        assert owner.stdout.readline() == "ready\n"
        helpers = psutil.Process(owner.pid).children(recursive=True)
        assert len(helpers) >= 2  # the forked one and the server
        os.killpg(owner.pid, signal.SIGTERM)
        owner.stdin.write("\n")
        owner.stdin.flush()
        assert owner.stdout.readline() == "3 True\n"
        owner.kill()
        owner.wait()
        _, alive = psutil.wait_procs(helpers, timeout=60)
        assert not alive
    finally:
        owner.kill()
        owner.stdin.close()
        owner.stdout.close()
