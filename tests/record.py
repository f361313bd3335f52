"""Record what one real training step holds and sends, on every rank: bytes and collectives.

The collectives are read where torch dispatches them to a backend, so whoever calls them, under
whatever name, is seen; so are the tensors that autograd keeps for the backward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import optimizer as core_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.proof.collective_calls import collective_call
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.side_channels import channel_place
from tests.bare import Trainee, prepare


class Sent(NamedTuple):
    """One kind of collective: what it is, between which global ranks, of how many bytes.

    Bytes are those of the whole tensor: the input of an all-reduce and of a reduce-scatter, the
    output of an all-gather, this rank's input of an all-to-all, the message of a send.
    """

    kind: str
    ranks: tuple[int, ...]
    bytes: int


@dataclass
class Recorded:
    """What a rank held and sent during one step.

    Attributes:
        parameters, gradients, optimizer: bytes of parameter storage, of gradient buffers, and of
            the optimizer's own parameters and state, all as allocated.
        collectives: how often each was made, between forward pass and end of the step; groups of
            one rank are left out.
        saved: bytes that autograd kept for the backward pass of the first microbatch, by place:
            ``embedding``, a layer's global number, or ``head``. A storage is counted once, where it
            was first kept, and parameters are not counted.
    """

    parameters: int
    gradients: int
    optimizer: int
    collectives: Counter[Sent] = field(default_factory=Counter)
    saved: dict[str, int] = field(default_factory=dict)


def record_step(spec: StepSpec, layout: ParallelLayout) -> Recorded:
    """Run one step of ``spec`` in ``layout``, on every rank of it, and return what this one did."""
    step = prepare(spec, layout)
    _ask_for_grad_norm_groups(step.optimizer)
    with _Collectives() as sent, _Saved(step) as saved:
        step.forward_backward()
        step.optimizer.step()
    return Recorded(
        _bytes(_parameter_storage(step)),
        _bytes(
            buffer.grad_data
            for chunk in step.wrapped
            for buffer in chunk.buffers + chunk.expert_parallel_buffers
        ),
        _bytes(_optimizer_tensors(step)),
        sent.counted,
        saved.bytes_by_place(),
    )


def _ask_for_grad_norm_groups(optimizer: Any) -> None:
    """Have asked what Megatron-Core 0.19 asks all ranks once in a run, in its first step: whether
    any parameter belongs to a group with a gradient norm of its own."""
    for group in getattr(core_optimizer, "SEPARATE_GRAD_NORM_GROUPS", ()):
        optimizer.has_grad_norm_group(group)


def peak_of_saved(spec: StepSpec, layout: ParallelLayout) -> int:
    """Return the most bytes that autograd kept at any one time of a step of ``spec``, on this rank:
    a storage counts once, from where it is first kept to where it is last released."""
    step = prepare(spec, layout)
    live = _Live({t.untyped_storage().data_ptr() for t in _parameter_storage(step)})
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda kept: kept.tensor):
        step.forward_backward()
    assert live.now == 0
    return live.peak


class _Live:
    """Counts the bytes of what autograd keeps."""

    def __init__(self, skip: set[int]) -> None:
        self._skip, self._holders = skip, Counter[int]()
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> _Kept:
        return _Kept(self, tensor)

    def hold(self, storage: torch.UntypedStorage, holders: int) -> None:
        pointer = storage.data_ptr()
        if pointer in self._skip:
            return
        before = self._holders[pointer]
        self._holders[pointer] += holders
        if not before or not self._holders[pointer]:
            self.now += holders * storage.nbytes()
            self.peak = max(self.peak, self.now)


class _Kept:
    """A tensor until autograd releases it."""

    def __init__(self, live: _Live, tensor: torch.Tensor) -> None:
        self._live, self.tensor = live, tensor
        live.hold(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self._live.hold(self.tensor.untyped_storage(), -1)


def _bytes(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _parameter_storage(step: Trainee) -> Iterator[torch.Tensor]:
    for chunk in step.chunks:
        yield from chunk.parameters()


def _optimizer_tensors(step: Trainee) -> Iterator[torch.Tensor]:
    """Yield what the optimizer allocates: float32 copies of parameters, and its state."""
    own = {t.untyped_storage().data_ptr() for t in _parameter_storage(step)}
    optimizer: Any = step.optimizer
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.untyped_storage().data_ptr() not in own:
                    yield parameter
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


class _Collectives(TorchDispatchMode):
    """Counts the collectives that are dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[Sent] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        call = collective_call(func, args)
        if call is not None:
            p2p = call.kind in ("send", "receive")
            ranks = (torch.distributed.get_rank(), call.peer) if p2p else call.ranks
            self.counted[Sent(call.kind, ranks, call.bytes)] += 1
        return func(*args, **(kwargs or {}))


class _Saved:
    """Notes the tensors that autograd keeps, by the place in the model that keeps them."""

    def __init__(self, step: Trainee):
        self._step = step
        self._handles: list[Any] = []
        self._open: list[Any] = []
        self._skip = {t.untyped_storage().data_ptr() for t in _parameter_storage(step)}
        self._seen: dict[int, tuple[str, torch.Tensor]] = {}

    def __enter__(self) -> _Saved:
        for chunk in self._step.chunks:
            model: Any = chunk
            decoder = model.decoder
            # Outermost, for what is kept outside the modules below: the loss.
            self._watch(model, "head" if model.post_process else "between layers")
            for number, layer in zip(decoder.layer_range, decoder.layers, strict=True):
                self._watch(layer, str(number))
            for channels in decoder.side_channels.values():
                self._watch(channels, channel_place(channels.channels))
            if model.pre_process:
                self._watch(model.embedding, "embedding")
                if hasattr(model.embedding, "side_channels"):
                    channels = model.embedding.side_channels
                    self._watch(channels, channel_place(channels.channels))
            if model.post_process:
                self._watch(decoder.final_norm, "head")
                self._watch(model.output_layer, "head")
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, module: torch.nn.Module, place: str) -> None:
        runs = 0

        def before(*_: Any) -> None:
            nonlocal runs
            runs += 1
            pack = self._pack(place) if runs == 1 else lambda tensor: tensor
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            hooks.__enter__()
            self._open.append(hooks)

        def after(*_: Any) -> None:
            self._open.pop().__exit__()

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after))

    def _pack(self, place: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in self._skip:
                self._seen.setdefault(pointer, (place, tensor))
            return tensor

        return pack

    def bytes_by_place(self) -> dict[str, int]:
        """Return the bytes of the first microbatch, by place."""
        totals: Counter[str] = Counter()
        for place, tensor in self._seen.values():
            totals[place] += tensor.untyped_storage().nbytes()
        return dict(totals)
