"""``python -m tests.faults --hours 1 --seed 1``: inject faults of all kinds and print the tally."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    os.environ["PYTHONWARNINGS"] = "ignore"  # the libraries' remarks, once per process
    from tests.faults.small_disk import allow_mounts

    allow_mounts()
    # Not above: the helpers of every save import this module again.
    from tests.faults.campaign import attempt, describe, run_campaign
    from tests.faults.catalog import KINDS
    from tests.faults.doors import Expected
    from tests.faults.workplace import Workplace

    named = {kind.name: kind for kind in KINDS}
    names = list(named)
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Inject faults into commands and runs, and check what must hold after each. "
        "Exits with 1 if something did not hold.",
        epilog="kinds:\n" + "\n".join(f"  {kind.name:<16}{kind.attacks}" for kind in KINDS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hours", type=float, default=1.0, metavar="H")
    parser.add_argument("--tries", type=int, metavar="N", help="end after N tries, if sooner")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument(
        "--kinds", nargs="+", default=names, choices=names, metavar="KIND", help="default: all"
    )
    parser.add_argument(
        "--only", metavar="KIND:SEED", help="repeat one try, by the name that a failure is given"
    )
    args = parser.parse_args()
    name, _, own = (args.only or "").partition(":")
    if args.only and not (name in named and own.isdecimal()):
        parser.error(f"--only takes KIND:SEED, such as {names[0]}:1000000; given: {args.only}")
    chosen = [named[name] for name in dict.fromkeys(args.kinds)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # prints the table as Ctrl-C does
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        place = Workplace(Path(root))
        try:
            if args.only:
                outcome = attempt(named[name], int(own), place, Expected())
                print(describe(name, int(own), outcome))
                return 1 if outcome.wrong else 0
            tally = run_campaign(
                chosen,
                place,
                args.seed,
                tries=args.tries,
                seconds=3600 * args.hours,
                say=lambda line: print(line, flush=True),
            )
        finally:
            place.close()
    print(tally.table(chosen))
    print(
        f"{tally.tries} tries, seed {args.seed}, {time.monotonic() - started:.0f} s: "
        f"{len(tally.failures)} failures"
    )
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
