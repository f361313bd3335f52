"""Run somebody else's training script on the host that there is."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_megacpp.errors import UserError
from nemo_megacpp.runtime.host import ensure_host


def run_script(script: str, arguments: Sequence[str] = ()) -> None:
    """Run a Python script as ``python script arguments…`` would, in this process.

    On a machine with a GPU the script runs untouched. Without one it finds the no-GPU host: gloo,
    and a CUDA device by all that it can ask. Modules beside the script come before installed ones,
    so a Megatron-LM checkout brings its own ``megatron``.

    Args:
        script: path of the script.
        arguments: what it reads from ``sys.argv``.

    Raises:
        UserError: there is no such file.
    """
    path = Path(script)
    if not path.is_file():
        raise UserError(f"There is no script {script}.")
    sys.path.insert(0, str(path.resolve().parent))
    ensure_host(script=True)
    sys.argv = [script, *arguments]
    runpy.run_path(str(path), run_name="__main__")
