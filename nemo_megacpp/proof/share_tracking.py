"""Follow what becomes of the shares that a collective brings together.

After a gather or an all-to-all a tensor holds a *share* of every rank of the group. For each
element that is computed from it, this module keeps the ranks whose shares the element depends on,
as :mod:`nemo_megacpp.proof.share_probe` finds them. What is copied, permuted, viewed, sliced or
computed element by element keeps its one share; attention, a scan, a convolution over tokens or a
sum bring several together.

A collective of another group carries shares to other ranks, whose groups make the same gathers: a
rank there has the same place in its group. So the ranks of a collective exchange what their
elements depend on, and each goes on with what it receives.

What happens to the shares of a gather is a list of :class:`Event`; what they mean is decided in
:mod:`nemo_megacpp.proof.gather_verdicts`, from all ranks' events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_leaves

from nemo_megacpp.proof.collective_calls import CollectiveCall
from nemo_megacpp.proof.share_probe import Probe

EventKind = Literal["join", "mix", "host", "sent", "reduced", "own", "others", "passed"]

_MOST_JOINS = 32
"""Meetings with other tensors that are noted for one gather."""
_UNREAD = ("empty", "rand")
"""Operators that read the shape of a tensor only, by a part of their names."""
_FOLLOWED = ("all_gather", "all_to_all", "reduce_scatter", "all_reduce")
_SUMS = ("reduce_scatter", "all_reduce")

Shares = dict[tuple[int, str, int], torch.Tensor]
"""Of some elements, by gather: its number, kind and group size, alike on ranks that mirror it."""
Exchange = Callable[[CollectiveCall, Sequence[Shares]], Sequence[Sequence[Shares]]]
"""Takes a call and the shares of what this rank sends to each rank of the group; returns what every
rank of the group gave."""


@dataclass(frozen=True)
class Event:
    """Something that happened to the shares of one gather.

    Attributes:
        kind: ``mix``: an element depends on several shares. ``host``: Python read a value.
            ``join``: another rank's share met another tensor, which may differ from rank to rank.
            ``sent``: a reduce-scatter or all-to-all of the same group took the shares.
            ``reduced``: an all-reduce of the same group did. ``own``: an operator used this rank's
            share only. ``others``: after that an operator used another rank's.
            ``passed``: a message or a broadcast took the shares, which are not followed there.
        op: the operator's or the collective's name.
        place: of the module that ran it.
        function: that called it: of Python in the forward pass, of autograd in the backward pass.
        digest: of the other tensors of a ``join``.
    """

    kind: EventKind
    op: str
    place: str
    function: str = ""
    digest: str = ""


@dataclass
class _Stored:
    """The shares that the elements of one storage depend on, as bits, by gather."""

    alive: StorageWeakRef
    length: int
    itemsize: int
    by_gather: dict[int, torch.Tensor]


class ShareTracker:
    """Keeps the shares of every element that is computed from a gather, until they are mixed or no
    tensor holds another rank's share any more.

    Args:
        exchange: between the ranks of a call; each of them takes part in every exchange.
        where: returns the names of the module and of the function that are running.
    """

    def __init__(self, exchange: Exchange, where: Callable[[], tuple[str, str]] = lambda: ("", "")):
        self._exchange = exchange
        self._where = where
        self._stored: dict[int, _Stored] = {}
        self._arriving: dict[int, StorageWeakRef] = {}
        self._me: dict[int, int] = {}
        self._ranks: dict[int, frozenset[int]] = {}
        self._keys: dict[int, tuple[int, str, int]] = {}
        self.events: dict[int, list[Event]] = {}

    def begin(self, gather: int, call: CollectiveCall) -> None:
        """Follow what a gather or an all-to-all received, under the number ``gather``, beside the
        shares of earlier ones."""
        self._me[gather], self._ranks[gather] = 1 << call.me, frozenset(call.ranks)
        self._keys[gather] = (gather, call.kind, len(call.ranks))
        self.events[gather] = []
        for rank, part in enumerate(call.parts_received()):
            if part.numel():
                mask = torch.full(part.shape, 1 << rank, dtype=torch.int32)
                self._write(part, self._masks(part) | {gather: mask})

    def end(self, gathers: list[int]) -> None:
        """Stop to follow gathers."""
        for gather in gathers:
            self._me.pop(gather, None)
            self._keys.pop(gather, None)
            for stored in self._stored.values():
                stored.by_gather.pop(gather, None)

    def take_part(self, call: CollectiveCall) -> None:
        """Note what a collective does with shares, and follow them, before it runs."""
        followed = call.kind in _FOLLOWED and not call.name.endswith("coalesced_")
        for gather, others in [found for tensor in call.sent for found in self._read(tensor)]:
            if not others:
                self._note(gather, "own", call.kind)
            elif self._is_among_its_ranks(gather, call):
                if call.kind in ("reduce_scatter", "all_to_all"):
                    self._note(gather, "sent", call.kind)
                elif call.kind == "all_reduce":
                    self._note(gather, "reduced", call.kind)
            elif not followed:
                self._note(gather, "passed", call.kind)
        if not followed:
            return
        sent = [
            {self._keys[gather]: mask.flatten().clone() for gather, mask in found.items()}
            for found in map(self._masks, call.parts_sent())
        ]
        parts = [
            self._received(call, rank, given[call.me])
            for rank, given in enumerate(self._exchange(call, sent))
        ]
        for tensor in call.received:
            self._write(tensor, {})
        if call.kind not in _SUMS:
            into = call.parts_received()
        else:
            into, parts = call.received, [self._summed(call.kind, parts)]
        if call.kind == "reduce_scatter":
            storage = call.received[0].untyped_storage()
            self._arriving[storage._cdata] = StorageWeakRef(storage)
        for part, masks in zip(into, parts, strict=True):
            if part.numel():
                shaped = {gather: mask.view(part.shape) for gather, mask in masks.items()}
                self._write(part, shaped)

    def _is_among_its_ranks(self, gather: int, call: CollectiveCall) -> bool:
        """Whether a call is between ranks that have different places in the gather's group."""
        return len(self._ranks[gather].intersection(call.ranks)) > 1

    def _received(self, call: CollectiveCall, rank: int, given: Shares) -> dict[int, torch.Tensor]:
        """Return the shares, by gather, that a part from one rank of a call brings.

        Between ranks of the gather itself, shares that were reduced or sent are back where they
        came from, and another rank's own share could have come without the gather.
        """
        found = {}
        for key, mask in given.items():
            gather = key[0]
            if self._keys.get(gather) != key:
                continue
            stays = rank == call.me and call.kind in ("all_gather", "all_reduce")
            if stays or not self._is_among_its_ranks(gather, call):
                found[gather] = mask
        return found

    def _summed(self, kind: str, parts: list[dict[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
        """Return the shares of a sum over ranks."""
        found: dict[int, torch.Tensor] = {}
        for masks in parts:
            for gather, mask in masks.items():
                found[gather] = found[gather] | mask if gather in found else mask
        for gather, mask in list(found.items()):
            if _brings_together(mask):
                del found[gather]
                self._settle(gather, "mix", kind)
        return found

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, and note on which shares its results depend."""
        leaves, form = tree_flatten((args, kwargs))
        tensors = {i: leaf for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)}
        name = func._schema.name.split("::")[-1]
        if func.is_view or any(part in name for part in _UNREAD):
            return func(*args, **kwargs)
        if self._arriving and self._arrives(name, tensors.values()):
            return func(*args, **kwargs)
        marked: dict[int, dict[int, torch.Tensor]] = {}
        for i, tensor in tensors.items():
            for gather, mask in self._masks(tensor).items():
                marked.setdefault(gather, {})[i] = mask
        if not marked:
            return func(*args, **kwargs)
        changes = func._schema.is_mutable
        before = {i: tensor.clone() for i, tensor in tensors.items()} if changes else tensors
        result = func(*args, **kwargs)
        outputs = tree_leaves(result)
        written: list[dict[int, torch.Tensor]] = [{} for _ in outputs]
        for gather, masks in marked.items():
            probe = Probe(func, leaves, form, before, masks, changes)
            self._depend(gather, name, probe, outputs, written)
        inputs = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
        for output, found in zip(outputs, written, strict=True):
            if not torch.is_tensor(output):
                continue
            if changes or output.untyped_storage()._cdata not in inputs:
                self._write(output, found)
        return result

    def _arrives(self, name: str, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether an operator is gloo's copy into the result of a reduce-scatter that is waited
        for: gloo sums in a buffer of its own, which is not followed."""
        touched = self._arriving.keys() & {t.untyped_storage()._cdata for t in tensors}
        for address in touched:
            del self._arriving[address]
        return name == "copy_" and bool(touched)

    def _depend(
        self,
        gather: int,
        name: str,
        probe: Probe,
        outputs: list[Any],
        written: list[dict[int, torch.Tensor]],
    ) -> None:
        """Find the shares of every output of one operator, for one gather."""
        mine = self._me[gather]
        others = any(bool((mask & ~mine).any()) for mask in probe.masks.values())
        if not others:
            self._note(gather, "own", name)
        elif not any(torch.is_tensor(output) for output in outputs):
            return self._settle(gather, "host", name)
        elif any(event.kind == "own" for event in self.events[gather]):
            self._note(gather, "others", name)
        found = probe.shares(outputs)
        for mask in found:
            if mask is not None and _brings_together(mask):
                return self._settle(gather, "mix", name)
        if others and len(self.events[gather]) < _MOST_JOINS:
            digest = probe.digest_of_others()
            if digest and probe.meets_others(outputs, found, mine):
                event = Event("join", name, *self._where(), digest)
                self.events[gather].append(event)
        for into, mask in zip(written, found, strict=True):
            if mask is not None and bool(mask.any()):
                into[gather] = mask
        return None

    def _note(self, gather: int, kind: EventKind, op: str) -> None:
        event = Event(kind, op, *self._where())
        if kind == "join" or all(other.kind != kind for other in self.events[gather]):
            self.events[gather].append(event)

    def _settle(self, gather: int, kind: EventKind, op: str) -> None:
        self._note(gather, kind, op)
        self.end([gather])

    def _masks(self, tensor: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return the shares of a tensor's elements, by gather, where it has any."""
        stored = self._stored.get(tensor.untyped_storage()._cdata)
        if stored is None:
            return {}
        found = {}
        for gather, bits in stored.by_gather.items():
            if tensor.element_size() == stored.itemsize:
                place = (tensor.size(), tensor.stride(), tensor.storage_offset())
                mask = bits.as_strided(*place)
            else:  # read as another type: any element may depend on any share
                union = reduce(int.__or__, bits.unique().tolist(), 0)
                mask = torch.full(tensor.shape, union, dtype=torch.int32)
            if bool(mask.any()):
                found[gather] = mask
        return found

    def _read(self, tensor: torch.Tensor) -> Iterator[tuple[int, bool]]:
        """Yield the gathers of a tensor, and whether another rank's share is among its elements."""
        for gather, mask in self._masks(tensor).items():
            yield gather, bool((mask & ~self._me[gather]).any())

    def _write(self, tensor: torch.Tensor, masks: Mapping[int, torch.Tensor]) -> None:
        """Set the shares of the elements that were written."""
        storage = tensor.untyped_storage()
        stored = self._stored.get(storage._cdata)
        if stored is None and not masks:
            return
        if stored is None or stored.itemsize != tensor.element_size():
            self._forget_dead()
            length = storage.nbytes() // tensor.element_size()
            alive = StorageWeakRef(storage)  # while it is held, no other storage has the address
            stored = _Stored(alive, length, tensor.element_size(), {})
            self._stored[storage._cdata] = stored
        place = (tensor.size(), tensor.stride(), tensor.storage_offset())
        for gather, bits in stored.by_gather.items():
            if gather not in masks:
                bits.as_strided(*place).zero_()
        for gather, mask in masks.items():
            if gather in self._me:
                bits = stored.by_gather.setdefault(
                    gather, torch.zeros(stored.length, dtype=torch.int32)
                )
                bits.as_strided(*place).copy_(mask)

    def _forget_dead(self) -> None:
        """Drop storages that are freed, and gathers of which only this rank's share is left."""
        for address in [a for a, stored in self._stored.items() if stored.alive.expired()]:
            del self._stored[address]
        held = {
            gather
            for stored in self._stored.values()
            for gather, bits in stored.by_gather.items()
            if bool((bits & ~self._me[gather]).any())
        }
        over = {g for stored in self._stored.values() for g in stored.by_gather} - held
        for gather in over:
            for stored in self._stored.values():
                stored.by_gather.pop(gather, None)


def _brings_together(mask: torch.Tensor) -> bool:
    """Whether an element depends on several shares."""
    return bool((mask & (mask - 1)).any())
