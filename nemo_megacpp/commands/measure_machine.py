"""``nemo-megacpp measure-machine``: measure this machine for ``plan`` and ``layouts``."""

from __future__ import annotations

import json
import socket
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from nemo_megacpp.errors import UserError
from nemo_megacpp.render import Table, make_console, print_table, show_bytes

_WIDTH = 110
_EPILOG = """\
on one node:  torchrun --nproc-per-node 8 --no-python nemo-megacpp measure-machine --out m.json
on several:   the same under your launcher, with all its ranks
then:         nemo-megacpp layouts RECIPE --world-size N --machine m.json"""


def add_parser(commands: Any) -> None:
    """Add ``measure-machine`` to the command line's parsers."""
    parser: ArgumentParser = commands.add_parser(
        "measure-machine",
        help="measure this machine's speeds for plan and layouts",
        description="Time matrix multiplications, memory and, over the ranks that a launcher has "
        "started, links in and between nodes. Writes the JSON file that --machine reads.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="machine.json", metavar="FILE.json", help="file to write")
    parser.add_argument("--name", help="of the machine; default: the host's")
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    """Measure, write the file on the first rank, and print what was measured.

    Raises:
        UserError: the file's name or folder is wrong.
    """
    path = Path(args.out)
    if path.suffix != ".json" or path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: give the name of a .json file in a folder that exists.")

    from nemo_megacpp.contract.machine import machine_document
    from nemo_megacpp.doctor.measure import measure_machine

    machine = measure_machine(args.name or socket.gethostname())
    if machine is None:
        return 0
    path.write_text(json.dumps(machine_document(machine), indent=1) + "\n", encoding="utf-8")
    table = Table(("<measured", "value"))
    for name, peak in machine.flops.items():
        table.add(f"matrix multiplication, {name}", f"{peak / 1e12:,.3f} TFLOP/s")
    table.add("memory", f"{show_bytes(machine.hbm_bandwidth)}/s")
    for where, link in (("in a node", machine.in_node), ("between nodes", machine.between_nodes)):
        value = f"{show_bytes(link.bandwidth)}/s, {link.latency * 1e6:,.1f} us"
        table.add(f"link {where}, one way", value)
    table.add("least time of a kernel", f"{machine.kernel_seconds * 1e6:,.1f} us")
    console = make_console(_WIDTH)
    print_table(console, table)
    console.print(f"{machine.source}\nwritten: {path}", highlight=False, soft_wrap=True)
    return 0
