"""A collective as torch dispatches it to a backend: what kind, between whom, of which tensors.

Whoever calls a collective, under whatever name, is seen there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

# What torch.distributed's functions become, and the arguments that receive and that send.
_KINDS: dict[str, tuple[str, int, int]] = {
    "allreduce_": ("all_reduce", 0, 0),
    "allreduce_coalesced_": ("all_reduce", 0, 0),
    "_allgather_base_": ("all_gather", 0, 1),
    "allgather_": ("all_gather", 0, 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 0, 1),
    "_reduce_scatter_base_": ("reduce_scatter", 0, 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 0, 1),
    "alltoall_base_": ("all_to_all", 0, 1),
    "send": ("send", 0, 0),
    "recv_": ("receive", 0, 0),
    "broadcast_": ("broadcast", 0, 0),
}
_LARGER_IS_SENT = ("reduce_scatter", "all_to_all")


@dataclass(frozen=True)
class CollectiveCall:
    """One call of a collective on this rank.

    Attributes:
        name: of the operator, in torch's namespace ``c10d``.
        kind: as :attr:`nemo_megacpp.formulas.collectives.Collective.kind`.
        ranks: global ranks of the group, in its order.
        me: this rank's place in it.
        received, sent: the tensors that the call writes and reads.
        arguments: of the operator.
        group: of the ranks.
    """

    name: str
    kind: str
    ranks: tuple[int, ...]
    me: int
    received: tuple[torch.Tensor, ...]
    sent: tuple[torch.Tensor, ...]
    arguments: tuple[Any, ...]
    group: torch.distributed.ProcessGroup | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor: the input of an all-reduce and of a reduce-scatter, the output
        of an all-gather, this rank's input of an all-to-all, the message of a send."""
        larger = self.sent if self.kind in _LARGER_IS_SENT else self.received
        return sum(tensor.numel() * tensor.element_size() for tensor in larger)

    @property
    def peer(self) -> int:
        """The global rank at the other end of a send or a receive."""
        return self.ranks[self.arguments[2]]

    def parts_received(self) -> Sequence[torch.Tensor]:
        """Return what each rank of the group sent here, as views of what was received."""
        if self.name == "alltoall_base_":
            return _split(self.received[0], self.arguments[3], len(self.ranks))
        if self.name == "_allgather_base_":
            return self.received[0].flatten().chunk(len(self.ranks))
        assert self.name == "allgather_", f"{self.name}: parts of coalesced tensors are not told"
        return self.received

    def parts_sent(self) -> Sequence[torch.Tensor]:
        """Return what this rank sends to each rank of the group, as views of what it sends: the
        same to all of them in an all-gather and in an all-reduce."""
        if self.name == "alltoall_base_":
            return _split(self.sent[0], self.arguments[4], len(self.ranks))
        if self.name == "_reduce_scatter_base_":
            return self.sent[0].flatten().chunk(len(self.ranks))
        return self.sent * len(self.ranks)


def collective_call(func: Any, args: tuple[Any, ...]) -> CollectiveCall | None:
    """Return the collective between several ranks that an operator is; None if it is none."""
    if func.namespace != "c10d":
        return None
    name = func._schema.name.removeprefix("c10d::")
    group = next((pg for pg in map(_group_of, args) if pg is not None), None)
    if group is None or group.size() == 1 or name == "barrier":
        return None
    kind, received, sent = _KINDS.get(name, (name.strip("_"), 0, 0))
    ranks = tuple(torch.distributed.get_process_group_ranks(group))
    return CollectiveCall(
        *(name, kind, ranks, group.rank()),
        *(tuple(_tensors(args[received])), tuple(_tensors(args[sent])), args, group),
    )


def run_on_copies(func: Any, call: CollectiveCall) -> Any:
    """Run a collective to its end on copies of its tensors, so that its backend never holds them.

    A thread of gloo lets go of a call's tensors some time after the call has ended. Who asks when a
    tensor was freed would get an answer that changes from run to run.
    """
    if call.kind in ("send", "receive"):  # one alone waits for the other rank's next call
        return func(*call.arguments)
    copies = {id(tensor): tensor.clone() for tensor in (*call.sent, *call.received)}
    result = func(*tree_map(lambda leaf: copies.get(id(leaf), leaf), call.arguments))
    work = result[-1] if isinstance(result, tuple) else result
    torch.distributed.Work.unbox(work).wait()
    for tensor in call.received:
        tensor.copy_(copies[id(tensor)])
    return result


def _split(tensor: torch.Tensor, sizes: Sequence[int], ranks: int) -> Sequence[torch.Tensor]:
    return tensor.split(list(sizes)) if sizes else tensor.chunk(ranks)


def _group_of(argument: Any) -> torch.distributed.ProcessGroup | None:
    if not isinstance(argument, torch.ScriptObject):
        return None
    with contextlib.suppress(RuntimeError):  # a reduction operator
        return torch.distributed.ProcessGroup.unbox(argument)
    return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    else:
        for item in value:
            yield from _tensors(item)
