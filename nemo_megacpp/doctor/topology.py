"""The links between this machine's GPUs, from the matrix of ``nvidia-smi topo -m``."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

_TIMEOUT = 30.0
_GPU = re.compile(r"GPU\d+")
_NIC = re.compile(r"NIC\d+|mlx5_\d+")
_NVLINK = re.compile(r"NV\d+")
_PATHS = ("PIX", "PXB", "PHB", "NODE", "SYS")
"""PCIe paths, shortest first: one bridge, several, the CPU's, another one's, another socket's."""


@dataclass(frozen=True)
class Topology:
    """What connects the GPUs of one machine.

    Attributes:
        gpus: names, in the order of the matrix.
        nics: names of network interfaces, in the order of the matrix.
        links: between two of either: ``NV18`` for 18 bonded NVLinks, else a PCIe path.
    """

    gpus: tuple[str, ...]
    nics: tuple[str, ...]
    links: Mapping[tuple[str, str], str]

    def domains(self) -> list[tuple[str, ...]]:
        """Return the GPUs that NVLink connects, each with each, in order of their first one."""
        domains: list[tuple[str, ...]] = []
        for gpu in self.gpus:
            if any(gpu in domain for domain in domains):
                continue
            joined = [gpu]
            for other in self.gpus:
                if all(self._nvlink(other, member) for member in joined):
                    joined.append(other)
            domains.append(tuple(joined))
        return domains

    def worst_path(self) -> str | None:
        """Return the longest PCIe path between two GPUs without NVLink; None if all have it."""
        paths = [
            self.links[a, b]
            for a in self.gpus
            for b in self.gpus
            if a != b and not self._nvlink(a, b)
        ]
        known = [path for path in paths if path in _PATHS]
        return max(known, key=_PATHS.index) if known else next(iter(paths), None)

    def far_from_a_nic(self) -> tuple[str, ...]:
        """Return the GPUs whose nearest network interface is behind a CPU."""
        far = ("PHB", "NODE", "SYS")
        return tuple(
            gpu
            for gpu in self.gpus
            if self.nics and all(self.links[gpu, nic] in far for nic in self.nics)
        )

    def _nvlink(self, a: str, b: str) -> bool:
        return _NVLINK.fullmatch(self.links.get((a, b), "")) is not None


def parse_topology(text: str) -> Topology | None:
    """Read the output of ``nvidia-smi topo -m``; None if there is no such matrix in it."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    heads = (i for i, row in enumerate(rows) if row[:1] == ["GPU0"] and "X" not in row)
    first = next(heads, None)
    if first is None:
        return None
    names = [name for name in rows[first] if _GPU.fullmatch(name) or _NIC.fullmatch(name)]
    links: dict[tuple[str, str], str] = {}
    for row in rows[first + 1 :]:
        if row and row[0] in names and len(row) > len(names):
            links.update({(row[0], name): row[i + 1] for i, name in enumerate(names)})
    if any((a, b) not in links for a in names for b in names if _GPU.fullmatch(a)):
        return None
    gpus = tuple(name for name in names if _GPU.fullmatch(name))
    return Topology(gpus, tuple(name for name in names if name not in gpus), links)


def read_topology() -> Topology | None:
    """Ask ``nvidia-smi``; None where it is absent, fails, or prints something else."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=_TIMEOUT
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_topology(told.stdout) if told.returncode == 0 else None
