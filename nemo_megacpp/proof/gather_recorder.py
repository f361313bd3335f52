"""Record every gather and all-to-all of a step, and what becomes of what they bring together."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_megacpp.proof.collective_calls import CollectiveCall, collective_call, run_on_copies
from nemo_megacpp.proof.module_places import ModulePlaces, Phase, Place
from nemo_megacpp.proof.share_tracking import Event, Shares, ShareTracker

_GATHERS = ("all_gather", "all_to_all")


@dataclass
class RecordedGather:
    """One gather or all-to-all of the first microbatch, on one rank.

    Attributes:
        kind: ``all_gather`` or ``all_to_all``.
        ranks: global ranks of the group, ascending.
        ordinal: how many gathers and all-to-alls this group had made before.
        phase, place: when, and the module that asked for it.
        caller: file and line of the module's method; empty in the backward pass.
        bytes: of the gathered tensor; of this rank's input of an all-to-all.
        is_float: whether it holds floating-point numbers.
        events: what happened to the shares.
        last_read: the module that read the received tensor last, with its phase.
        freed: the module that was running when the tensor was freed, with its phase; empty if it
            stayed, or if another collective wrote to its storage.
        overwritten: whether another collective wrote to its storage before it was freed.
    """

    kind: str
    ranks: tuple[int, ...]
    ordinal: int
    phase: Phase
    place: Place
    caller: str
    bytes: int
    is_float: bool
    events: list[Event] = field(default_factory=list)
    last_read: str = ""
    freed: str = ""
    overwritten: bool = False


class GatherRecorder(TorchDispatchMode):
    """Records while it is entered; the result is ``gathers``.

    Args:
        chunks: this rank's model chunks, unwrapped.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]):
        super().__init__()
        self._places = ModulePlaces(chunks)
        self._tracker = ShareTracker(_exchange, lambda: (self._name(), self._places.function()))
        self._made: Counter[tuple[int, ...]] = Counter()
        self._phase: Phase = "forward"
        self._alive: dict[int, list[StorageWeakRef]] = {}
        self._readers: dict[int, int] = {}
        self.gathers: list[RecordedGather] = []

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._look_for_freed()
        self._places.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._look_for_freed()
        self._follow_phase()
        call = collective_call(func, args)
        if not func.is_view:
            self._look_for_readers((args, kwargs) if call is None else call.sent)
        if call is None:
            return self._tracker.run(func, args, kwargs)
        self._tracker.take_part(call)
        result = run_on_copies(func, call)
        if call.kind in _GATHERS:
            self._record(call)
        return result

    def _name(self) -> str:
        place = self._places.here()
        return "" if place is None else place.path

    def _when(self) -> str:
        return f"{self._places.phase} {self._name()}"

    def _record(self, call: CollectiveCall) -> None:
        place = self._places.here()
        ranks = tuple(sorted(call.ranks))
        ordinal = self._made[ranks]
        self._made[ranks] += 1
        addresses = {t.untyped_storage()._cdata for t in call.received}
        for gather, references in self._alive.copy().items():
            if addresses & {reference.cdata for reference in references}:
                self.gathers[gather].overwritten = True
                self._drop(gather)
        if place is None or place.run > 1:
            return
        number = len(self.gathers)
        phase = self._places.phase
        self.gathers.append(
            RecordedGather(
                *(call.kind, ranks, ordinal, phase, place),
                _caller() if phase != "backward" else "",
                call.bytes,
                call.received[0].is_floating_point(),
            )
        )
        self._tracker.begin(number, call)
        self.gathers[number].events = self._tracker.events[number]
        self._alive[number] = [StorageWeakRef(t.untyped_storage()) for t in call.received]
        self._readers |= dict.fromkeys(addresses, number)

    def _follow_phase(self) -> None:
        """A gather is judged by the pass that makes it: what autograd saves is for another."""
        phase = self._places.phase
        if phase != self._phase:
            self._phase = phase
            self._tracker.end(list(range(len(self.gathers))))

    def _look_for_readers(self, read: Any) -> None:
        for tensor in tree_leaves(read) if self._readers else ():
            if torch.is_tensor(tensor):
                gather = self._readers.get(tensor.untyped_storage()._cdata)
                if gather is not None:
                    self.gathers[gather].last_read = self._when()

    def _look_for_freed(self) -> None:
        for gather, references in list(self._alive.items()):
            if all(reference.expired() for reference in references):
                outside = self._places.here() is None
                recorded = self.gathers[gather]
                recorded.freed = recorded.last_read if outside else self._when()
                self._drop(gather)

    def _drop(self, gather: int) -> None:
        del self._alive[gather]
        self._readers = {a: other for a, other in self._readers.items() if other != gather}


@torch.no_grad()
def tell_parts_apart(chunks: Sequence[torch.nn.Module]) -> None:
    """Add noise to the parameters that tp, ep and etp split, so that no two parts are alike: what a
    gather meets is taken for one rank's own if it differs from rank to rank."""
    dense = parallel_state.get_tensor_model_parallel_rank()
    etp = parallel_state.get_expert_tensor_parallel_rank()
    expert = 1000 * (1 + parallel_state.get_expert_model_parallel_rank()) + etp
    for chunk in chunks:
        for parameter in chunk.parameters():
            if getattr(parameter, "tensor_model_parallel", False):
                part = dense if getattr(parameter, "allreduce", True) else expert
                generator = torch.Generator().manual_seed(1 + part)
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.05 * noise.to(parameter))


def _exchange(call: CollectiveCall, sent: Sequence[Shares]) -> list[Sequence[Shares]]:
    given: list[Any] = [None] * len(call.ranks)
    torch.distributed.all_gather_object(given, sent, group=call.group)
    return given


def _caller() -> str:
    """Return file and line of the innermost method of a module that is being called."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), torch.nn.Module):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
