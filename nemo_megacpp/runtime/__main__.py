"""``python -m nemo_megacpp.runtime SCRIPT arguments…``: run a training script, GPU or not.

Under torchrun: ``torchrun --nproc-per-node 2 -m nemo_megacpp.runtime SCRIPT arguments…``.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_megacpp.errors import UserError
from nemo_megacpp.runtime.host import ensure_host


def run_script(script: str, arguments: Sequence[str] = ()) -> None:
    """Run a Python script as ``python script arguments…`` would, in this process.

    With a GPU the script runs untouched. Without one it runs on the no-GPU host: gloo, and calls of
    ``torch.cuda`` that describe a device. Modules beside the script are imported before installed
    ones, so a Megatron-LM checkout uses its own ``megatron``.

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


def main() -> None:
    """Run the script that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    try:
        run_script(sys.argv[1], sys.argv[2:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
