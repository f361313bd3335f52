"""The matrix of ``nvidia-smi topo -m``: NVLink domains, PCIe paths, network interfaces."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemo_megacpp.doctor import machine, topology
from nemo_megacpp.doctor.topology import parse_topology

_LEGEND = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def _matrix(link: list[list[str]], nics: list[list[str]], underlined: bool = False) -> str:
    """Return what nvidia-smi prints; some versions underline the heading."""
    names = [f"GPU{i}" for i in range(len(link))] + [f"NIC{i}" for i in range(len(nics))]
    head = "\t".join(["\t", *names, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"])
    lines = [f"\x1b[4m{head}\x1b[0m" if underlined else head]
    for i, row in enumerate(link):
        cells = [" X " if i == j else cell for j, cell in enumerate(row)]
        lines.append("\t".join([f"GPU{i}", *cells, *(nic[i] for nic in nics), "0-47", "0", "N/A"]))
    for i, nic in enumerate(nics):
        others = [" X " if i == j else "SYS" for j in range(len(nics))]
        lines.append("\t".join([f"NIC{i}", *nic, *others]))
    return "\n".join(lines) + _LEGEND


def test_one_domain() -> None:
    text = _matrix([["NV18"] * 8] * 8, [["PIX"] + ["NODE"] * 7] * 8, underlined=True)
    found = parse_topology(text)
    assert found is not None
    assert len(found.gpus) == len(found.nics) == 8
    assert found.domains() == [found.gpus]
    assert found.worst_path() is None
    assert found.far_from_a_nic() == tuple(f"GPU{i}" for i in range(1, 8))


def test_two_bridged_pairs() -> None:
    """Four PCIe cards, NVLink bridges between two and two."""
    link = [["NV4" if i // 2 == j // 2 else "SYS" for j in range(4)] for i in range(4)]
    found = parse_topology(_matrix(link, []))
    assert found is not None
    assert found.domains() == [("GPU0", "GPU1"), ("GPU2", "GPU3")]
    assert found.worst_path() == "SYS" and found.far_from_a_nic() == ()


def test_what_is_no_matrix() -> None:
    whole = _matrix([["PHB"] * 2] * 2, [])
    assert parse_topology(whole) is not None
    for text in ("", "Failed to initialize NVML", _LEGEND, whole.partition("GPU1\tPHB")[0]):
        assert parse_topology(text) is None


@pytest.mark.parametrize(
    ("link", "found", "cost"),
    [("NV18", "4 GPUs", ""), ("PHB", "1 of 4 GPUs", "through the host (path PHB): use tp=1")],
)
def test_the_doctor_tells_of_the_links(
    monkeypatch: pytest.MonkeyPatch, link: str, found: str, cost: str
) -> None:
    """Peer access alone would count PCIe as NVLink."""
    text = _matrix([[link] * 4] * 4, [["SYS"] * 4])
    device = SimpleNamespace(name="GPU", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: True)
    told = SimpleNamespace(returncode=0, stdout=text)
    monkeypatch.setattr(topology.subprocess, "run", lambda *args, **options: told)
    findings = {finding.part: finding for finding in machine.machine_findings(gpus=4)}
    assert findings["NVLink domain"].found == found and cost in findings["NVLink domain"].cost
    assert findings["network interfaces"].found == "behind a CPU for GPU0, GPU1, GPU2, GPU3"
