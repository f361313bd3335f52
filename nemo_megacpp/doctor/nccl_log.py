"""NCCL's log: which processes each communicator joins, and over what they reach one another.

NCCL writes it with ``NCCL_DEBUG=INFO``, one line for each rank of a communicator that it
initializes (``init.cc``); the lines name the communicator since NCCL 2.17.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout.parallel import MAX_RANKS
from nemo_megacpp.printable import shown

_LINE = re.compile(r"(\S+):(\d+):(\d+) \[-?\d+\] NCCL INFO (.*)")
_MEMBER = re.compile(
    r"\brank (\d+) nranks (\d+) .*\bcommId (0x[0-9a-f]+)\b.*Init (?:START|COMPLETE)"
)
_CHANNEL = re.compile(r"Channel \d+(?:/\d+)? : \d+\[\w+\] -> \d+\[\w+\] .*\bvia (P2P|SHM|NET)\b")
_LONGEST = 2000
"""Characters of a line; longer ones are of another program."""


class Process(NamedTuple):
    """A process of the job: one rank."""

    host: str
    pid: int


@dataclass(frozen=True)
class Communicator:
    """A communicator.

    Attributes:
        name: its ``commId``.
        members: its processes, in the order of their ranks in it.
        transports: of its channels: ``P2P`` (NVLink or PCIe), ``SHM`` (host memory), ``NET``.
    """

    name: str
    members: tuple[Process, ...]
    transports: frozenset[str]


def read_communicators(lines: Iterable[str]) -> list[Communicator]:
    """Return the communicators of a log, or of the logs of all nodes after one another.

    Raises:
        UserError: no communicator is in the log, or one of whose ranks some are missing.
    """
    members: dict[str, dict[int, Process]] = defaultdict(dict)
    sizes: dict[str, int] = {}
    transports: dict[str, set[str]] = defaultdict(set)
    current: dict[tuple[str, str, str], str] = {}  # a thread sets up one communicator at a time
    for line in lines:
        found = _LINE.search(line) if len(line) <= _LONGEST else None
        if found is None:
            continue
        host, pid, thread, text = found.groups()
        if member := _MEMBER.search(text):
            rank, size, name = int(member[1]), int(member[2]), member[3]
            if not rank < size <= MAX_RANKS or sizes.setdefault(name, size) != size:
                raise UserError(
                    f"The log contradicts itself about communicator {name}: {shown(text)}."
                )
            members[name][rank] = Process(host, int(pid))
            current[host, pid, thread] = name
        elif (via := _CHANNEL.search(text)) and (host, pid, thread) in current:
            transports[current[host, pid, thread]].add(via[1])
    if not members:
        raise UserError(
            "The log names no communicators. Run the job with NCCL_DEBUG=INFO (NCCL 2.17 or "
            "newer), and give the output of all its nodes."
        )
    for name, ranks in members.items():
        if len(ranks) < sizes[name]:
            absent = next(rank for rank in range(sizes[name]) if rank not in ranks)
            raise UserError(
                f"Communicator {name} has {sizes[name]:,} ranks, of which the log names "
                f"{len(ranks):,}; rank {absent} is missing. Give the logs of all nodes."
            )
    return [
        Communicator(name, tuple(ranks[r] for r in range(sizes[name])), frozenset(transports[name]))
        for name, ranks in members.items()
    ]
