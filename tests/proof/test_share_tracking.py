"""What a gather was for, told from what is computed of it: on plain tensors, without ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nemo_megacpp.proof.collective_calls import CollectiveCall
from nemo_megacpp.proof.gather_verdicts import GatherVerdict, verdict_of
from nemo_megacpp.proof.share_tracking import Event, Shares, ShareTracker

RANKS = 2
S, B, H = 8, 3, 6
"""Tokens of all ranks, rows, channels."""


class _Follow(TorchDispatchMode):
    """Lets a tracker run every operator inside."""

    def __init__(self, tracker: ShareTracker):
        super().__init__()
        self.tracker = tracker

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return self.tracker.run(func, args, kwargs or {})


class _Rank:
    """What a function under test may use of its rank."""

    def __init__(self, me: int, tracker: ShareTracker):
        self.me, self.tracker = me, tracker

    def mine(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(RANKS)[self.me]

    def random(self, *shape: int) -> torch.Tensor:
        """Return numbers that differ from rank to rank."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.me))

    def reduce_scatter(self, whole: torch.Tensor) -> None:
        self._call("_reduce_scatter_base_", "reduce_scatter", whole)

    def all_to_all(self, whole: torch.Tensor) -> None:
        self._call("alltoall_base_", "all_to_all", whole)

    def all_reduce(self, whole: torch.Tensor) -> None:
        self._call("allreduce_", "all_reduce", whole)

    def _call(self, name: str, kind: str, whole: torch.Tensor) -> None:
        received = whole if kind == "all_reduce" else torch.empty_like(whole.chunk(RANKS)[0])
        if kind == "all_to_all":
            received = torch.empty_like(whole)
        args = (None, None, None, [], [])
        call = CollectiveCall(name, kind, (0, 1), self.me, (received,), (whole,), args)
        self.tracker.take_part(call)


def _echo(call: CollectiveCall, sent: Sequence[Shares]) -> list[Sequence[Shares]]:
    """As if every rank of a call gave what this one gives."""
    return [sent] * len(call.ranks)


Function = Callable[[torch.Tensor, _Rank], Any]


def judged(function: Function, received: torch.Tensor | None = None) -> GatherVerdict:
    """Return the verdict on a gather whose result ``function`` uses on both ranks."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(S, B, H, generator=generator) if received is None else received
    events = []
    for me in range(RANKS):
        tracker = ShareTracker(_echo)
        mine = whole.clone()
        share = mine.flatten().chunk(RANKS)[me]
        call = CollectiveCall("_allgather_base_", "all_gather", (0, 1), me, (mine,), (share,), ())
        tracker.begin(0, call)
        with _Follow(tracker):
            function(mine, _Rank(me, tracker))
        events.append(tracker.events[0])
    return verdict_of(events, whole.is_floating_point())


WEIGHT = torch.randn(H, H, generator=torch.Generator().manual_seed(5))
ZIGZAG = torch.tensor([0, 3, 4, 7, 1, 2, 5, 6])

UNDONE: dict[str, Function] = {
    "a clamp": lambda x, rank: rank.mine(x.clamp(-1, 1)) + 1,
    "a norm of each token": lambda x, rank: rank.mine(F.rms_norm(x, (H,))) * 2,
    "a product with a whole weight": lambda x, rank: rank.mine(F.gelu(x @ WEIGHT)).exp(),
    "another order and back": lambda x, rank: rank.mine(x[ZIGZAG].sin()[ZIGZAG.argsort()]) + 1,
    "a slice at once": lambda x, rank: rank.mine(x).clone(),
    "an index instead of a slice": lambda x, rank: x.index_select(
        0, torch.arange(S).chunk(RANKS)[rank.me]
    ),
    "rows apart, joined, and split": lambda x, rank: (
        rank.mine(torch.cat([part.exp() for part in x.chunk(4)])) + 1
    ),
    "the largest channels of each token": lambda x, rank: (
        rank.mine(torch.zeros_like(x).scatter(-1, x.topk(2).indices, 1.0)) + 1
    ),
    "in place": lambda x, rank: rank.mine(x.mul_(2).add_(1)) + 1,
    "into a buffer": lambda x, rank: rank.mine(torch.zeros(S, B, H).copy_(x)) + 1,
    "a product of queries": lambda x, rank: (
        rank.mine(
            F.scaled_dot_product_attention(x.transpose(0, 1), WEIGHT[None], WEIGHT[None]).transpose(
                0, 1
            )
        )
        + 1
    ),
    "scattered by a sum of equal terms": lambda x, rank: rank.reduce_scatter(x * 2),
    "an exchange back": lambda x, rank: rank.all_to_all(x.exp()),
    "a weight of its own, for its own tokens": lambda x, rank: rank.mine(x @ rank.random(H, H)) + 1,
    "nothing": lambda x, rank: None,
}

NEEDED: dict[str, tuple[Function, str]] = {
    "attention over tokens": (
        lambda x, rank: F.scaled_dot_product_attention(
            *[rank.mine(x).transpose(0, 1)] + [x.transpose(0, 1)] * 2
        ),
        "matrix product over ranks'",
    ),
    "a scan": (lambda x, rank: rank.mine(x.cumsum(0)), "scan over ranks'"),
    "a loop over tokens": (
        lambda x, rank: (
            [state := torch.zeros(B, H)] + [state := torch.tanh(state + token) for token in x]
        ),
        "over ranks' shares",
    ),
    "a convolution over tokens": (
        lambda x, rank: F.conv1d(x.permute(1, 2, 0), torch.ones(H, 1, 3), groups=H),
        "convolution over ranks'",
    ),
    "a softmax over tokens": (lambda x, rank: rank.mine(x.softmax(0)), "softmax over ranks'"),
    "a shift by one token": (lambda x, rank: rank.mine(x + x.roll(1, 0)), "over ranks'"),
    "a sum over tokens": (lambda x, rank: x.sum(0), "sum over ranks'"),
    "a weight's gradient": (
        lambda x, rank: x.flatten(0, 1).t() @ torch.ones(S * B, H),
        "matrix product over ranks'",
    ),
    "a sort of tokens": (lambda x, rank: rank.mine(x.sort(0).indices) + 1, "sort"),
    "columns of a weight": (
        lambda x, rank: rank.reduce_scatter(F.gelu(x @ rank.random(H, H))),
        "matrix product with its own part",
    ),
    "columns, summed everywhere": (
        lambda x, rank: rank.all_reduce(x @ rank.random(H, H)),
        "matrix product with its own part",
    ),
    "columns, then shares of a sum": (
        lambda x, rank: [rank.all_reduce(y := x @ rank.random(H, H)), rank.mine(y) + 1],
        "matrix product with its own part",
    ),
    "a gate of its own, sent back": (
        lambda x, rank: rank.all_to_all(x * rank.random(S, B, H)),
        "element-wise product with its own part",
    ),
    "a value for the host": (lambda x, rank: x[0, 0, 0].item() + x[-1, 0, 0].item(), "host"),
}


@pytest.mark.parametrize("name", UNDONE)
def test_a_gather_that_is_undone(name: str) -> None:
    verdict = judged(UNDONE[name])
    assert verdict.verdict == "undone", verdict


@pytest.mark.parametrize("name", NEEDED)
def test_a_gather_that_is_needed(name: str) -> None:
    function, why = NEEDED[name]
    verdict = judged(function)
    assert verdict.verdict == "needed", verdict
    assert why in verdict.why, verdict


def test_integers_that_no_operator_reads_are_for_the_host() -> None:
    counts = torch.arange(S * B * H).view(S, B, H)
    assert judged(lambda x, rank: None, counts).why == "read by the host"
    assert judged(lambda x, rank: rank.mine(x) + 1, counts).verdict == "undone"
    assert judged(lambda x, rank: x.sum(0), counts).verdict == "needed"


def test_one_rank_that_needs_it_is_enough() -> None:
    verdict = judged(lambda x, rank: x.cumsum(0) if rank.me else rank.mine(x) + 1)
    assert verdict.verdict == "needed"


def test_a_cut_on_one_rank_only_is_not_a_convenience_gather() -> None:
    """The other rank goes on with the share that it received, beside what is its own."""

    def exchanged(x: torch.Tensor, rank: _Rank) -> torch.Tensor:
        return x.chunk(RANKS)[0] * rank.random(S // RANKS, B, H)

    assert judged(exchanged).why == "element-wise product with its own part"


def test_a_buffer_that_is_written_again_holds_no_shares() -> None:
    def overwritten(x: torch.Tensor, rank: _Rank) -> None:
        rank.mine(x).clone()
        x.copy_(torch.ones(S, B, H))
        x.sum(0)

    assert judged(overwritten).verdict == "undone"


def test_channels_may_be_gathered_as_well() -> None:
    """A gather over channels: its parts lie side by side in every token."""

    def by_channel(function: Function) -> GatherVerdict:
        events = []
        for me in range(RANKS):
            tracker = ShareTracker(_echo)
            whole = torch.randn(S, B, H)
            parts = [part.clone() for part in whole.chunk(RANKS, -1)]
            call = CollectiveCall("allgather_", "all_gather", (0, 1), me, tuple(parts), (), ())
            tracker.begin(0, call)
            with _Follow(tracker):
                function(torch.cat(parts, -1), _Rank(me, tracker))
            events.append(tracker.events[0])
        return verdict_of(events)

    assert by_channel(lambda x, rank: F.rms_norm(x, (H,))).verdict == "needed"
    own = by_channel(lambda x, rank: x.cumsum(0).chunk(RANKS, -1)[rank.me] + 1)
    assert own.verdict == "undone", "a scan over tokens leaves channels alone"


TP, CP = (0, 1), (0, 2)
"""The groups of rank 0 of four; the gather under test is over TP."""


class _Meeting:
    """Where the threads that stand for ranks give each other what they hold."""

    def __init__(self, ranks: int):
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.given: dict[int, Any] = {}

    def exchange(self, me: int, value: Any) -> list[Any]:
        self.given[me] = value
        self.barrier.wait()
        found = [self.given[rank] for rank in sorted(self.given)]
        self.barrier.wait()
        return found


class _OfFour:
    """One of four ranks: its places, and collectives over its CP group that move numbers, too."""

    def __init__(self, rank: int, meeting: _Meeting):
        self.tp, self.cp = rank % 2, rank // 2
        self.meeting = meeting
        self.tracker = ShareTracker(lambda call, sent: meeting.exchange(self.cp, sent))

    def mine(self, whole: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return whole.chunk(2, dim)[self.tp]

    def others(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(2)[1 - self.tp]

    def to_itself_and_to_the_peer(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.cat([other, one] if self.cp else [one, other])

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._call("_allgather_base_", "all_gather", x, torch.cat)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        def moved(given: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([sent.chunk(2)[self.cp] for sent in given])

        return self._call("alltoall_base_", "all_to_all", x, moved)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        def moved(given: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(given).sum(0).chunk(2)[self.cp]

        return self._call("_reduce_scatter_base_", "reduce_scatter", x, moved)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._call("allreduce_", "all_reduce", x, lambda given: torch.stack(given).sum(0))

    def _call(
        self,
        name: str,
        kind: str,
        x: torch.Tensor,
        moved: Callable[[list[torch.Tensor]], torch.Tensor],
    ) -> torch.Tensor:
        with _disable_current_modes():
            result = moved(self.meeting.exchange(self.cp, x.clone()))
            into = x if kind == "all_reduce" else torch.empty_like(result)
            args = (None, None, None, [], [])
            call = CollectiveCall(name, kind, CP, self.cp, (into,), (x,), args)
            self.tracker.take_part(call)
            if kind != "reduce_scatter":
                into.copy_(result)
            if kind in ("all_gather", "all_to_all"):
                self.tracker.begin(1, call)
        return into.copy_(result) if kind == "reduce_scatter" else into  # gloo's copy is seen


def judged_across(function: Callable[[torch.Tensor, _OfFour], Any]) -> GatherVerdict:
    """Return the verdict on a gather over TP on four ranks, each a thread."""
    meetings = [_Meeting(2), _Meeting(2)]

    def events(rank: int) -> list[Event]:
        whole = torch.randn(S, 4, H, generator=torch.Generator().manual_seed(rank // 2))
        one = _OfFour(rank, meetings[rank % 2])
        share = one.mine(whole).flatten()
        call = CollectiveCall("_allgather_base_", "all_gather", TP, one.tp, (whole,), (share,), ())
        one.tracker.begin(0, call)
        with _Follow(one.tracker):
            function(whole, one)
        return one.tracker.events[0]

    with ThreadPoolExecutor(4) as threads:
        of_all = list(threads.map(events, range(4)))
    return verdict_of(of_all[:2])


def _by_row(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).contiguous()


ACROSS: dict[str, tuple[Callable[[torch.Tensor, _OfFour], Any], str]] = {
    "cut, then gathered": (lambda x, r: r.all_gather(r.mine(x.clamp(-1, 1))) + 1, "cut back"),
    "gathered, then cut": (lambda x, r: r.mine(r.all_gather(_by_row(x)), 1) + 1, "cut back"),
    "exchanged, then cut": (lambda x, r: r.mine(r.all_to_all(_by_row(x)), 1) + 1, "cut back"),
    "summed, then cut": (lambda x, r: r.mine(r.reduce_scatter(_by_row(x)), 1) + 1, "cut back"),
    "gathered, then scanned": (
        lambda x, r: r.all_gather(_by_row(x)).cumsum(1),
        "scan over ranks' shares",
    ),
    "summed, then scanned": (
        lambda x, r: r.reduce_scatter(_by_row(x)).cumsum(1),
        "scan over ranks' shares",
    ),
    "only another rank's part holds a share": (
        lambda x, r: (
            r.all_to_all(r.to_itself_and_to_the_peer(r.mine(x), r.others(x)))
            * torch.full((S, 4, H), 1.0 + r.tp)
        ),
        "element-wise product with its own part",
    ),
    "a reduce-scatter of different shares": (
        lambda x, r: r.reduce_scatter(x.roll(r.cp * S // 2, 0)),
        "reduce-scatter over ranks' shares",
    ),
    "an all-reduce of different shares": (
        lambda x, r: r.all_reduce(x.roll(r.cp * S // 2, 0)),
        "all-reduce over ranks' shares",
    ),
}


@pytest.mark.parametrize("name", ACROSS)
def test_shares_are_followed_through_collectives_of_another_group(name: str) -> None:
    function, why = ACROSS[name]
    verdict = judged_across(function)
    assert why in verdict.why, verdict
    assert verdict.verdict == ("undone" if why == "cut back" else "needed")
