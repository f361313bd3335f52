"""Time what a user waits for before anything runs: the import of the package and ``--help``.

    python -m benchmarks.startup

Both as processes of their own, from the start of the interpreter to its end, beside an interpreter
that does nothing. Neither may load torch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

from benchmarks.harness import Row, common_arguments, finish, paired, start

NOTHING = ("-c", "pass")
FORMS = (
    ("startup: import nemo_megacpp", ("-c", "import nemo_megacpp"), 0.3),
    ("startup: nemo-megacpp --help", ("-m", "nemo_megacpp.cli", "--help"), 0.5),
)


def process(arguments: tuple[str, ...]) -> Callable[[], None]:
    """Return a run of the interpreter with ``arguments``, which raises if it fails."""

    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    return run


def modules_of(arguments: tuple[str, ...]) -> set[str]:
    """Return the packages that an interpreter with ``arguments`` imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    names = (line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line)
    return {name.partition(".")[0] for name in names}


def main() -> int:
    """Time both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser)
    parser.set_defaults(repeats=9)
    arguments = parser.parse_args()
    device = start(arguments)
    rows = []
    for claim, form, most in FORMS:
        if "torch" in modules_of(form):
            raise RuntimeError(f"{claim} loads torch")
        work, nothing = process(form), process(NOTHING)
        ours, peer = paired(work, nothing, repeats=arguments.repeats, device=device)
        aim = f"at most {most} s"
        sizes = "a process, start to end"
        rows.append(Row(claim, ours, peer, "python -c pass", sizes, aim=aim, aim_at_most=most))
    return finish(arguments, rows)


if __name__ == "__main__":
    sys.exit(main())
