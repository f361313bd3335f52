"""``python -m tests.faults --kills 100 --seed 1``: kill ranks across saves and print the tally."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    os.environ["PYTHONWARNINGS"] = "ignore"  # the libraries' remarks, once per process
    # Not above: the helpers of every save import this module again.
    from nemo_megacpp.runtime.workers import WorkerPool
    from tests.faults.campaign import run_campaign
    from tests.faults.saving import RANKS

    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="kills that must meet a save")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, WorkerPool(RANKS) as pool:
        tally = run_campaign(pool, Path(folder), args.kills, args.seed, say=print)
    print(tally.table())
    print(
        f"{tally.kills} kills in mid-save, seed {args.seed}, {time.perf_counter() - started:.0f} s:"
        f" {len(tally.wrong)} wrong"
    )
    for wrong in tally.wrong:
        print(wrong)
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
