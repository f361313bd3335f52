"""Slots: what a sequence gives does not depend on the others, nor on who had its slot before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_megacpp.errors import UserError
from nemo_megacpp.inference.completions import Prompt, complete
from nemo_megacpp.inference.sampling import GREEDY, Sampling
from nemo_megacpp.inference.slot_batch import SlotBatch
from nemo_megacpp.mixers.slot_context import SlotContext
from nemo_megacpp.runtime.workers import WorkerPool
from tests.generation import CASES, random_model

TOLERANCE = 1e-12
"""Of the largest logit, in float64."""
VOCAB, MOST = 118, 10
PROMPTS = ([5, 17, 80, 2], [9], [44, 3, 3, 71, 60, 12, 7], [101, 9, 33])


def _logits_alone(model: Any, tokens: list[int], steps: list[int]) -> list[torch.Tensor]:
    batch = SlotBatch(model, 1, 16, VOCAB)
    slot, logits = batch.add(tokens)
    found = [logits]
    for token in steps:
        found.append(batch.step({slot: token})[slot])
    return found


def _same(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error < TOLERANCE, (what, error)


def _isolation(name: str) -> None:
    model, steps = random_model(CASES[name]), [4, 90, 31, 8, 8]
    alone = [_logits_alone(model, prompt, steps) for prompt in PROMPTS]
    batch = SlotBatch(model, 3, 16, VOCAB)

    def begin(index: int) -> int:
        slot, logits = batch.add(PROMPTS[index])
        _same(logits, alone[index][0], f"prompt {index}")
        return slot

    def step(at: dict[int, tuple[int, int]]) -> None:
        """Take a step of sequences, given as slot -> (index, number of the step)."""
        found = batch.step({slot: steps[number] for slot, (_, number) in at.items()})
        for slot, (index, number) in at.items():
            _same(found[slot], alone[index][number + 1], f"{index} after step {number}")

    first, second = begin(0), begin(1)
    step({first: (0, 0), second: (1, 0)})
    third = begin(2)  # while two others go on
    step({first: (0, 1), third: (2, 0)})  # the second waits
    batch.remove(first)
    with pytest.raises(UserError, match="at least one token"):
        batch.add([])
    again = begin(3)
    assert again == first and batch.used == (0, 1, 2) and not batch.free
    with pytest.raises(UserError, match="All 3 slots"):
        batch.add([1])
    with pytest.raises(UserError, match="2 sequences do not fit the 1 free slots"):
        SlotBatch(model, 1, 16, VOCAB).add_all([[1], [2]])
    step({again: (3, 0), second: (1, 1), third: (2, 1)})
    batch.remove(second)
    step({again: (3, 1), third: (2, 2)})  # slots that are no neighbours
    assert [batch.length(slot) for slot in (again, second, third)] == [5, 0, 10]
    with pytest.raises(UserError, match="17 tokens does not fit"):
        batch.extend(third, [1] * 7)


@pytest.mark.parametrize("name", ["A", "M", "mamba3", "R", "AEMR"])
def test_a_sequence_does_not_see_the_others(ranks: WorkerPool, name: str) -> None:
    ranks.run(1, _isolation, name)


def _not_finite() -> str:
    model = random_model(CASES["AEMR"])
    with torch.no_grad():
        model.output_layer.weight[3, 2] = torch.nan
    batch = SlotBatch(model, 1, 8, VOCAB)
    with pytest.raises(UserError) as error:
        complete(batch, [Prompt((1, 2), 3, GREEDY)], lambda ids: "", None)
    return str(error.value)


def test_nan_logits_are_refused(ranks: WorkerPool) -> None:
    (message,) = ranks.run(1, _not_finite)
    assert "NaN or Inf (1 of 118)" in message


def _letters(ids: Any) -> str:
    return "".join(chr(0x100 + token) for token in ids)


def _completions() -> None:
    model = random_model(CASES["AEMR"])
    prompts = [
        Prompt(tuple(tokens), 6, Sampling(temperature=0.8, top_k=30, top_p=0.9, seed=seed))
        for seed, tokens in enumerate(PROMPTS)
    ]
    streamed: dict[int, str] = {}

    def emit(index: int, text: str, ended: bool) -> None:
        streamed[index] = streamed.get(index, "") + text + "." * ended

    together, times = complete(SlotBatch(model, 2, 16, VOCAB), prompts, _letters, None, emit)
    for index, (prompt, done) in enumerate(zip(prompts, together, strict=True)):
        (alone,), _ = complete(SlotBatch(model, 1, 16, VOCAB), [prompt], _letters, None)
        assert alone.tokens == done.tokens and len(done.tokens) == 6, index
        assert done.text == _letters(done.tokens)
        assert streamed[index] == done.text + "."
        assert done.reason == "length" and done.first_token_seconds > 0
    assert times.prefill_tokens == sum(map(len, PROMPTS))
    assert times.decode_tokens == 4 * 5  # the first token of each comes of its prompt
    # What a stop string or the end of a document cuts off.
    wanted = together[2]
    middle = wanted.text[3:5]
    stopped = Prompt(prompts[2].tokens, 6, prompts[2].sampling, stop=(middle,))
    (done,), _ = complete(SlotBatch(model, 1, 16, VOCAB), [stopped], _letters, None)
    assert (done.text, done.reason) == (wanted.text[: wanted.text.index(middle)], "stop")
    eos = wanted.tokens[2]
    (done,), _ = complete(SlotBatch(model, 1, 16, VOCAB), [prompts[2]], _letters, eos)
    at = wanted.tokens.index(eos)
    assert (done.tokens, done.reason) == (wanted.tokens[:at], "end")


def test_completions_depend_on_their_own_prompt_and_seed(ranks: WorkerPool) -> None:
    ranks.run(1, _completions)


def _families_of_a_user() -> str:
    model = random_model(CASES["R"])
    wanted = [logits for _, logits in SlotBatch(model, 4, 16, VOCAB).add_all(PROMPTS)]
    model.decoder._added_families = set(model.decoder.families)
    added = SlotBatch(model, 4, 16, VOCAB).add_all(PROMPTS)
    assert [slot for slot, _ in added] == [0, 1, 2, 3]
    for (_, found), each in zip(added, wanted, strict=True):
        _same(found, each, "a pass of its own")
    context = SlotContext(2, 16)
    context.select_pack([0, 1], [1, 2])
    with pytest.raises(UserError) as error:
        model(torch.ones(1, 3, dtype=torch.long), None, None, inference_context=context)
    return str(error.value)


def test_a_users_families_take_no_packed_prompts(ranks: WorkerPool) -> None:
    assert "families of its user's" in ranks.run(1, _families_of_a_user)[0]


def _passes(lengths: list[int]) -> list[slice]:
    batch = SlotBatch(random_model(CASES["F"]), 1, 1, VOCAB, most_packed=MOST)
    return list(batch._passes([[1] * n for n in lengths]))


def test_a_pass_has_few_tokens_or_one_prompt(ranks: WorkerPool) -> None:
    (found,) = ranks.run(1, _passes, [MOST - 2, 2, 1, MOST + 5, 1, 1])
    assert found == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)]
