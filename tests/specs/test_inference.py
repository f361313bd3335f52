"""States: step by step, in parts, and over TP, a model gives the logits of one pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_megacpp.checkpoint.dcp import save_model
from nemo_megacpp.core.inference import inference_mode
from nemo_megacpp.errors import UserError
from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.inference import constant, per_token
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.mixers.slot_context import SlotContext
from nemo_megacpp.pattern import Family
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerPool
from tests.bare import build_chunks, make_config
from tests.generation import CASES, random_model

TOLERANCE = 1e-10
"""Of the largest logit, in float64."""
LENGTH, BATCH = 13, 3


def _tokens(batch: int = BATCH, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(118, (batch, length), generator=generator)


@torch.no_grad()
def _one_pass(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, None, None, runtime_gather_output=True)


@torch.no_grad()
def _in_parts(
    model: Any,
    tokens: torch.Tensor,
    parts: Sequence[int],
    context: SlotContext | None = None,
    slots: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the logits of all tokens, ``parts`` of them at a time."""
    batch, length = tokens.shape
    context = context or SlotContext(batch, length, logits="all")
    found = []
    for part in tokens.split(list(parts), dim=1):
        context.select(slots or range(batch), part.size(1))
        with inference_mode():
            logits = model(part, None, None, inference_context=context, runtime_gather_output=True)
        found.append(logits)
        context.advance()
    return torch.cat(found, dim=1)


def _check(found: Any, wanted: Any, what: str) -> None:
    assert found.shape == wanted.shape
    error = float(abs(found - wanted).max() / abs(wanted).max())
    assert error < TOLERANCE, (what, error)


def _parts(name: str) -> None:
    model, tokens = random_model(CASES[name]), _tokens()
    wanted = _one_pass(model, tokens)
    others = _one_pass(model, tokens.roll(1, dims=1))
    assert not torch.allclose(others, wanted)
    for parts in ([LENGTH], [1] * LENGTH, [5, 8], [2, 1, 1, 7, 1, 1]):
        _check(_in_parts(model, tokens, parts), wanted, f"parts of {parts}")


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_sequence_give_the_logits_of_one_pass(ranks: WorkerPool, name: str) -> None:
    ranks.run(1, _parts, name)


def _different_lengths() -> None:
    model, tokens = random_model(CASES["AEMR"]), _tokens(3)
    wanted = _one_pass(model, tokens)
    context = SlotContext(5, LENGTH + 2, logits="all")
    # Slots that are no neighbours, in another order than they were filled, at different places.
    slots = (3, 0, 4)
    starts = (2, 7, 4)
    for row, slot, start in zip(range(3), slots, starts, strict=True):
        head = _in_parts(model, tokens[row : row + 1, :start], [start], context, [slot])
        _check(head, wanted[row : row + 1, :start], "first part")
    assert [context.lengths[slot] for slot in slots] == list(starts)
    for step in (1, 2, 1):
        rows = [context.lengths[slot] for slot in slots]
        part = torch.stack([tokens[i, at : at + step] for i, at in enumerate(rows)])
        found = _in_parts(model, part, [step], context, slots)
        expected = torch.stack([wanted[i, at : at + step] for i, at in enumerate(rows)])
        _check(found, expected, f"{step} tokens of each row")
    # A slot is used again after a sequence whose numbers overflowed.
    for tensors in context.key_value_memory_dict.values():
        for tensor in tensors:
            tensor[0] = torch.nan
    context.clear(0)
    again = _in_parts(model, tokens[:1], [LENGTH], context, [0])
    _check(again, wanted[:1], "a slot used again")


def test_sequences_of_different_lengths_share_a_batch(ranks: WorkerPool) -> None:
    ranks.run(1, _different_lengths)


@torch.no_grad()
def _packed(name: str) -> None:
    model, tokens, lengths = random_model(CASES[name]), _tokens(5), (5, 1, LENGTH - 2, 2, 8)
    wanted = _one_pass(model, tokens)
    slots = (4, 0, 1, 5, 2)
    for logits in ("all", "last"):
        context = SlotContext(6, LENGTH, logits=logits)
        context.select_pack(slots, lengths)
        row = torch.cat([tokens[i, :n] for i, n in enumerate(lengths)])[None]
        with inference_mode():
            found = model(row, None, None, inference_context=context, runtime_gather_output=True)
        context.advance()
        expected = [wanted[i, :n] for i, n in enumerate(lengths)]
        if logits == "all":
            _check(found[0], torch.cat(expected), "all tokens of a pack")
        else:
            _check(found[:, 0], torch.stack([each[-1] for each in expected]), "the last tokens")
        assert [context.lengths[slot] for slot in slots] == list(lengths)
        for step in range(2):
            part = torch.stack([tokens[i, n + step : n + step + 1] for i, n in enumerate(lengths)])
            found = _in_parts(model, part, [1], context, slots)
            expected = [wanted[i, n + step : n + step + 1] for i, n in enumerate(lengths)]
            _check(found, torch.stack(expected), f"step {step} after a pack")


@pytest.mark.parametrize("name", CASES)
def test_prompts_in_one_row_give_the_logits_of_passes_of_their_own(
    ranks: WorkerPool, name: str
) -> None:
    ranks.run(1, _packed, name)


@torch.no_grad()
def _megatrons_context() -> None:
    from megatron.core.inference.contexts import StaticInferenceContext

    model, tokens = random_model(CASES["AEMR"]), _tokens()
    wanted = _one_pass(model, tokens)
    context = StaticInferenceContext(BATCH + 1, LENGTH)
    for _ in range(2):  # the second prompt begins with the states of the first in memory
        context.reset()
        for part in tokens.split([6, 3, 1, 1, 1, 1], dim=1):
            with inference_mode():
                last = model(
                    part, None, None, inference_context=context, runtime_gather_output=True
                )
            context.increment_sequence_len_offset(part.size(1))
            at = context.sequence_len_offset - 1
            _check(last, wanted[:, at : at + 1], f"token {at}")


def test_megatrons_static_context_gives_the_logits_of_one_pass(ranks: WorkerPool) -> None:
    ranks.run(1, _megatrons_context)


def _split(name: str, layout: str, weights: str) -> np.ndarray:
    """Return the logits of a prefill and of steps."""
    model, tokens = random_model(CASES[name], layout, weights), _tokens()
    return _in_parts(model, tokens, [8, 1, 1, 1, 1, 1]).numpy()


def _save(name: str, weights: str) -> np.ndarray:

    model = random_model(CASES[name])
    save_model([model], weights)
    return _one_pass(model, _tokens()).numpy()


@pytest.mark.parametrize("name", ["AEMR", "AEMR mamba3"])
def test_tp_gives_the_logits_of_one_rank(ranks: WorkerPool, name: str, tmp_path: Path) -> None:
    weights = str(tmp_path / "weights")
    (wanted,) = ranks.run(1, _save, name, weights)
    for logits in ranks.run(2, _split, name, "tp=2,sp=false", weights):
        _check(logits, wanted, "TP=2")


def test_experts_over_ep_generate_as_on_one_rank(ranks: WorkerPool, tmp_path: Path) -> None:
    weights = str(tmp_path / "weights")
    (wanted,) = ranks.run(1, _save, "AEMR", weights)
    for logits in ranks.run(2, _split, "AEMR", "ep=2,world=2", weights):
        _check(logits, wanted, "EP=2")


def _kept(name: str, layout: str, dtype: str) -> int:
    parsed = ParallelLayout.parse(layout)
    start_model_parallel(parsed)
    spec = StepSpec(CASES[name], dtype=dtype)  # type: ignore[arg-type]
    (model,) = build_chunks(make_config(spec, parsed), parsed)
    context = SlotContext(2, LENGTH)
    model.eval()
    _in_parts(model, _tokens(2, 3), [3], context)
    return sum(t[0].nbytes for tensors in context.key_value_memory_dict.values() for t in tensors)


@pytest.mark.parametrize("layout", ["tp=1", "tp=2,sp=false"])
@pytest.mark.parametrize("name", ["AEMR", "AEMR mamba3", "mamba3 mimo", "R short filter"])
def test_the_stated_state_is_what_is_allocated(ranks: WorkerPool, name: str, layout: str) -> None:
    parsed = ParallelLayout.parse(layout)
    sizes = Sizes(Job(CASES[name], parsed, precision="fp32"))
    stated = 0
    for letter in sizes.letters:
        declare = block_of(Family(letter)).inference_state
        assert declare is not None
        kept = declare(sizes)
        stated += constant(kept) + LENGTH * per_token(kept)
    assert ranks.run(parsed.tp, _kept, name, layout, "float32") == [stated] * parsed.tp


_REFUSED = {
    "tp=2": ("AEMR", "sequence parallelism"),
    "cp=2": ("AEMR", "CP=2"),
    "pp=2,vpp=2": ("AEMR", "VPP=2"),
}


def _refused(name: str, layout: str) -> str:
    parsed = ParallelLayout.parse(layout)
    start_model_parallel(parsed)
    model, *_ = build_chunks(make_config(StepSpec(CASES[name]), parsed), parsed)
    with pytest.raises(UserError) as error:
        _in_parts(model.eval(), _tokens(1, 4), [4])
    return str(error.value)


@pytest.mark.parametrize("layout", _REFUSED)
def test_what_has_no_inference_is_refused(ranks: WorkerPool, layout: str) -> None:
    name, reason = _REFUSED[layout]
    for message in ranks.run(2, _refused, name, layout):
        assert reason in message


def _refused_passes() -> list[str]:
    messages = []
    model = random_model(tiny_model("F"))
    model.train()
    for context in (SlotContext(1, 4), _Dynamic()):
        with pytest.raises(UserError) as error:
            context.select([0], 1)
            model(_tokens(1, 1), None, None, inference_context=context, runtime_gather_output=True)
        messages.append(str(error.value))
    return messages


class _Dynamic(SlotContext):
    """Stands for Megatron's dynamic context, whose constructor needs flash-attn."""

    def __init__(self) -> None:
        super().__init__(1, 4)

    def is_static_batching(self) -> bool:
        return False


def test_a_pass_that_has_no_context_is_refused(ranks: WorkerPool) -> None:
    ((trains, dynamic),) = ranks.run(1, _refused_passes)
    assert "eval()" in trains
    assert "DynamicInferenceContext" in dynamic
