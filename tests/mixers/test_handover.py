"""States handed from segment to segment: exact, and in one order of messages on every rank."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from nemo_megacpp.mixers.handover import receive_state, send_state
from nemo_megacpp.runtime.workers import WorkerPool

SEGMENTS, LENGTH = 3, 4
_SIZES = (2, 3)


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(SEGMENTS * LENGTH, 1, dtype=torch.float64, generator=generator)
    return tokens, torch.randn(sum(_SIZES), dtype=torch.float64, generator=generator)


def _segment(x: torch.Tensor, weight: torch.Tensor, group: Any) -> torch.Tensor:
    """Two hand-overs of different sizes, as a layer of R makes them: a window, then a state.

    What the first of them depends on is computed again after the second, so that autograd has
    nodes of the first part that were made later than the second receive.
    """
    window_weight, state_weight = weight.split(_SIZES)
    window, x = receive_state(torch.zeros(_SIZES[0], dtype=x.dtype), x, group)
    after = window + (x * window_weight).sum(0)
    x = send_state(after, x * torch.tanh(after).sum(), group)
    state, x = receive_state(torch.zeros(_SIZES[1], dtype=x.dtype), x, group)
    for token in x.clone():
        state = torch.tanh(state * state_weight + token)
    return send_state(state, x * state.sum(), group)


def _on_rank() -> tuple[list[list[float]], list[float], list[tuple[str, int, int]]]:
    """Return this segment's output, the gradient of the weight, and the messages in order."""
    group = torch.distributed.group.WORLD
    rank = torch.distributed.get_rank()
    tokens, weight = _inputs()
    weight.requires_grad_()
    x = tokens.chunk(SEGMENTS)[rank].requires_grad_()
    messages: list[tuple[str, int, int]] = []
    send, recv = torch.distributed.send, torch.distributed.recv

    def sent(tensor: torch.Tensor, to: int, **options: Any) -> None:
        messages.append(("send", to, tensor.numel()))
        send(tensor, to, **options)

    def received(tensor: torch.Tensor, of: int, **options: Any) -> None:
        messages.append(("recv", of, tensor.numel()))
        recv(tensor, of, **options)

    with mock.patch("torch.distributed.send", sent), mock.patch("torch.distributed.recv", received):
        y = x
        for _ in range(2):  # two layers
            y = _segment(y, weight, group)
        y.square().sum().backward()
    return y.tolist(), weight.grad.tolist(), messages


def test_backward_reverses_the_messages_of_forward(ranks: WorkerPool) -> None:
    results = ranks.run(SEGMENTS, _on_rank)
    other = {"send": "recv", "recv": "send"}
    for _, _, messages in results:
        half = len(messages) // 2
        forward, backward = messages[:half], messages[half:]
        assert backward == [(other[kind], peer, size) for kind, peer, size in reversed(forward)]


def _nodes() -> tuple[str, str]:
    """Return the nodes that differentiate what is passed through a receive and a send."""
    group, x = torch.distributed.group.WORLD, torch.ones(3, requires_grad=True)
    _, through = receive_state(torch.zeros(2), x, group)
    output = send_state(2 * through[:2], through, group)
    return type(through.grad_fn).__name__, type(output.grad_fn).__name__


def test_the_order_is_a_dependency_and_not_a_choice_of_autograd(ranks: WorkerPool) -> None:
    """Nothing earlier can be differentiated before the messages of these two nodes."""
    (_, first), (last, _) = ranks.run(2, _nodes)
    assert (last, first) == ("_ReceiveBackward", "_SendBackward")


def _by_hand(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    window_weight, state_weight = weight.split(_SIZES)
    y = tokens
    for _ in range(2):
        window = torch.zeros(_SIZES[0], dtype=y.dtype)
        state = torch.zeros(_SIZES[1], dtype=y.dtype)
        out = []
        for x in y.chunk(SEGMENTS):
            window = window + (x * window_weight).sum(0)
            x = x * torch.tanh(window).sum()
            for token in x:
                state = torch.tanh(state * state_weight + token)
            out.append(x * state.sum())
        y = torch.cat(out)
    return y


def test_outputs_and_gradients_are_those_of_one_process(ranks: WorkerPool) -> None:
    results = ranks.run(SEGMENTS, _on_rank)
    tokens, weight = _inputs()
    weight.requires_grad_()
    expected = _by_hand(tokens, weight)
    expected.square().sum().backward()
    found = torch.tensor([row for output, _, _ in results for row in output], dtype=torch.float64)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    gradient = torch.tensor([grad for _, grad, _ in results], dtype=torch.float64).sum(0)
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-12, atol=1e-14)
