"""``python -m nemo_megacpp.runtime SCRIPT arguments…``: run a training script on what there is.

Under torchrun: ``torchrun --nproc-per-node 2 -m nemo_megacpp.runtime SCRIPT arguments…``.
"""

from __future__ import annotations

import sys

from nemo_megacpp.errors import UserError
from nemo_megacpp.runtime.foreign import run_script


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
