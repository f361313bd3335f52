"""A machine as an estimate reads it: its GPUs, their memory and links, and what of it is sustained.

A JSON file of a :class:`Machine` (``nemo-megacpp measure-machine`` writes one) stands beside the
named machines of :mod:`nemo_megacpp.contract.machine_presets`. Loads no torch.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from nemo_megacpp.json_files import read_json

Arithmetic = Literal["fp32", "bf16", "fp8"]

_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(gt=0, le=1)]
_Seconds = Annotated[float, Field(ge=0, le=1)]
_LIMIT = 1 << 16
_CONFIG = ConfigDict(
    strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
)


@dataclass(frozen=True, config=_CONFIG)
class Link:
    """What connects one GPU to others."""

    bandwidth: _Positive
    """Bytes a second that one GPU sends, while it receives as many."""
    latency: _Seconds
    """Seconds of a message without bytes."""


@dataclass(frozen=True, config=_CONFIG)
class Efficiency:
    """The share of a peak that each kind of work sustains. These are assumptions."""

    matmul: _Share = 0.7
    """Large matrix multiplications, of the GPU's floating-point peak."""
    grouped_matmul: _Share = 0.5
    """Those of experts, after the rows of each expert are padded to whole tiles."""
    attention: _Share = 0.45
    """Flash attention."""
    scan: _Share = 0.1
    """Chunked scans of M, and the arithmetic of R."""
    memory: _Share = 0.7
    """Norms, activations, permutations and the optimizer, of the memory's bandwidth."""
    link: _Share = 0.8
    """Collectives and messages, of a link's bandwidth."""


@dataclass(frozen=True, config=_CONFIG)
class Machine:
    """A machine of equal nodes.

    Raises:
        pydantic.ValidationError: a value is of the wrong type or out of range.
    """

    name: str
    """For people."""
    gpus_per_node: Annotated[int, Field(ge=1, le=1 << 20)]
    """GPUs of one NVLink domain."""
    hbm_bytes: Annotated[int, Field(ge=10**6, le=2**53)]
    """Memory of a GPU."""
    hbm_bandwidth: _Positive
    """Bytes a second that a GPU reads or writes."""
    flops: Annotated[dict[Arithmetic, _Positive], Field(min_length=1)]
    """Floating-point operations a second of dense matrix multiplications on one GPU."""
    in_node: Link
    """Between GPUs of a node."""
    between_nodes: Link
    """Between nodes, for each GPU."""
    kernel_seconds: _Seconds = 5e-6
    """The least time of one kernel or collective. An assumption."""
    recurrent_token_seconds: _Seconds = 1e-6
    """Time of one token of R's recurrence, forward; backward takes twice as long. An
    assumption."""
    efficiency: Efficiency = Efficiency()
    source: str = ""
    """Where the figures are from."""

    def peak(self, arithmetic: Arithmetic) -> float:
        """Return the operations a second in ``arithmetic``, or in the nearest wider one."""
        order: tuple[Arithmetic, ...] = ("fp8", "bf16", "fp32")
        wider = [name for name in order[order.index(arithmetic) :] if name in self.flops]
        return self.flops[wider[0]] if wider else min(self.flops.values())


def read_machine_file(path: Path) -> Machine:
    """Read the JSON file of a machine.

    Raises:
        UserError: it cannot be read, or a value is wrong or missing.
    """
    return read_json(path, TypeAdapter(Machine), _LIMIT)


def machine_document(machine: Machine) -> dict[str, Any]:
    """Return ``machine`` as plain data, which `read_machine_file` reads."""
    return asdict(machine)
