"""Completing prompts: continuous batches of sequences, and how long they take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from nemo_megacpp.inference.sampling import Sampler, Sampling
from nemo_megacpp.inference.slot_batch import SlotBatch
from nemo_megacpp.inference.text_stream import TextStream

Emit = Callable[[int, str, bool], object]


@dataclass(frozen=True)
class Prompt:
    """What is to be completed.

    Attributes:
        tokens: of the prompt, at least one.
        max_new_tokens: most tokens of the completion.
        sampling: how they are chosen.
        stop: strings that end the completion.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()


@dataclass
class Completion:
    """What came of a prompt.

    Attributes:
        prompt: the prompt.
        tokens: generated, without the one that ends a document.
        text: of them, up to a stop string.
        reason: why it ended: ``end`` of a document, ``stop`` string, or ``length``; empty while it
            goes on.
        first_token_seconds: from the start of all prompts to the first token of this one.
    """

    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = ""
    first_token_seconds: float = 0.0


@dataclass
class Times:
    """Where the time went.

    Attributes:
        prefill_tokens: of prompts.
        prefill_seconds: in which they ran, and the first token of each was chosen.
        decode_tokens: that came of steps, in which each sequence gets one token.
        decode_seconds: of these steps.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


def complete(
    batch: SlotBatch,
    prompts: Sequence[Prompt],
    decode: Callable[[Sequence[int]], str],
    eos_id: int | None,
    emit: Emit = lambda index, text, ended: None,
) -> tuple[list[Completion], Times]:
    """Complete prompts of any lengths, as many at once as the batch has slots.

    Prompts begin as soon as slots are free, as many in one pass as there are
    (:meth:`SlotBatch.add_all`). Every rank of the model calls this; the tokens are
    those of rank 0.

    Args:
        batch: empty.
        prompts: to complete.
        decode: from ids to text.
        eos_id: the token that ends a document.
        emit: is given the number of a prompt, new text of its completion, and whether it has ended.

    Raises:
        UserError: the logits of a sequence are NaN or Inf, or it does not fit the slots.
    """
    started, times = time.perf_counter(), Times()
    completions = [Completion(prompt) for prompt in prompts]
    samplers = [Sampler(prompt.sampling) for prompt in prompts]
    streams = [TextStream(decode, prompt.tokens, prompt.stop) for prompt in prompts]
    waiting = deque(range(len(prompts)))
    running: dict[int, int] = {}  # the prompt in each slot
    following: dict[int, int] = {}  # the token that each slot gets next

    def take(slot: int, logits: torch.Tensor) -> None:
        """Choose a sequence's next token, and end the sequence there or go on."""
        index = running[slot]
        done, stream = completions[index], streams[index]
        token = _agreed(samplers[index].choose(logits))
        if not done.tokens:
            done.first_token_seconds = time.perf_counter() - started
        text = ""
        if token == eos_id:
            done.reason = "end"
        else:
            done.tokens.append(token)
            text = stream.push(token)
            if stream.stopped:
                done.reason = "stop"
            elif len(done.tokens) == done.prompt.max_new_tokens:
                done.reason = "length"
        if done.reason in ("end", "length"):
            text += stream.close()
            done.reason = "stop" if stream.stopped else done.reason
        done.text += text
        if text or done.reason:
            emit(index, text, bool(done.reason))
        if done.reason:
            batch.remove(slot)
            del running[slot]
            following.pop(slot, None)
        else:
            following[slot] = token

    while waiting or running:
        while waiting and batch.free:
            begun = time.perf_counter()
            begin = [waiting.popleft() for _ in range(min(batch.free, len(waiting)))]
            added = batch.add_all([prompts[index].tokens for index in begin])
            for index, (slot, logits) in zip(begin, added, strict=True):
                running[slot] = index
                take(slot, logits)
                times.prefill_tokens += len(prompts[index].tokens)
            times.prefill_seconds += time.perf_counter() - begun
        if running:
            begun = time.perf_counter()
            for slot, logits in batch.step(following).items():
                times.decode_tokens += 1
                take(slot, logits)
            times.decode_seconds += time.perf_counter() - begun
    return completions, times


def _agreed(token: int) -> int:
    """Return rank 0's token: ranks whose logits differ by rounding would go different ways."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        chosen = torch.tensor([token], device=torch.cuda.current_device())
        torch.distributed.broadcast(chosen, src=0)
        return int(chosen)
    return token
