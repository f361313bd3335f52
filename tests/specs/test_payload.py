"""What crosses a cut: declared from the model's fields, packed and unpacked without loss."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.core.model import CoreModel, model_arguments, stage_argument
from nemo_megacpp.errors import UserError
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.proof.step_spec import StepSpec
from nemo_megacpp.runtime.distributed import fake_rank
from nemo_megacpp.specs.named import read_spec_name
from nemo_megacpp.specs.payload import (
    PayloadItem,
    StagePayload,
    declared,
    payload_at,
    schedule_seq_length,
    sends_shapes,
)
from nemo_megacpp.specs.stack_spec import build_hybrid_stack_spec
from tests.bare import build_chunks, make_config

STATE = HybridFields(m2rnn_depth_state=True, m2rnn_value_head_dim=5)


def _config(pp: int = 4, vpp: int | None = None) -> Any:
    return SimpleNamespace(
        hidden_size=7,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=3,
        sequence_parallel=True,
        variable_seq_lengths=False,
    )


def _shapes(letters: str, fields: HybridFields, config: Any) -> list[tuple[int, int, int]]:
    """What crosses each cut of a row of four tokens."""
    cuts = range(1, len(letters))
    return [payload_at(cut, letters, fields, config).shape(4, 1) for cut in cuts]


def test_hidden_states_alone_cross_as_they_are() -> None:
    """The very tensor: a model without extras sends s*b*h numbers, and copies none."""
    hidden = torch.randn(4, 2, 7)
    payload = payload_at(2, "RMRA", HybridFields(), _config())
    assert payload == StagePayload(7)
    assert payload.pack(hidden, {"m2rnn_depth_state": hidden}) is hidden
    received, extras = payload.unpack(hidden)
    assert received is hidden and extras == {}


@pytest.mark.parametrize(("room", "shape"), [(None, (4, 2, 12)), (6, (8, 2, 7))])
def test_pack_and_unpack(room: int | None, shape: tuple[int, ...]) -> None:
    """On the last axis, and in rows: 4 tokens of 6 numbers in 4 rows of 7."""
    payload = StagePayload(7, (PayloadItem("a", 2), PayloadItem("b", 3)), room)
    hidden, extras = torch.randn(4, 2, 7), {"b": torch.randn(4, 2, 3), "a": torch.randn(4, 2, 2)}
    for tensor in (hidden, *extras.values()):
        tensor.requires_grad_()
    packed = payload.pack(hidden, {**extras, "unused": hidden})
    assert packed.shape == shape
    given = sum(t.abs().sum() for t in (hidden, *extras.values()))
    assert torch.isclose(packed.abs().sum(), given)  # type: ignore[arg-type]  # the rest is zero
    received, found = payload.unpack(packed)
    assert torch.equal(received, hidden) and received.is_contiguous()
    assert list(found) == ["a", "b"]
    assert all(torch.equal(found[name], extras[name]) for name in found)
    (received.sum() + 2 * found["a"].sum() + 3 * found["b"].sum()).backward()
    gradients = [t.grad.unique().item() for t in (hidden, extras["a"], extras["b"])]  # type: ignore[union-attr]
    assert gradients == [1.0, 2.0, 3.0]


def test_rows_tell_how_many_tokens_came() -> None:
    """Whatever the widths and lengths: nothing else says it on the stage that receives."""
    for hidden, room in ((7, 1), (7, 7), (7, 20), (48, 4), (3584, 16)):
        payload = StagePayload(hidden, (PayloadItem("a", room),), room)
        for tokens in (1, 2, 3, 16, 223, 224, 225):
            message = torch.empty(payload.shape(tokens, 2), device="meta")
            received, extras = payload.unpack(message)
            assert received.shape == (tokens, 2, hidden)
            assert extras["a"].shape == (tokens, 2, room)


def test_what_is_declared_must_be_there() -> None:
    payload = StagePayload(7, (PayloadItem("a", 2),))
    with pytest.raises(KeyError, match="a"):
        payload.pack(torch.zeros(4, 2, 7), {})
    with pytest.raises(AssertionError):
        payload.pack(torch.zeros(4, 2, 7), {"a": torch.zeros(4, 2, 3)})
    with pytest.raises(AssertionError):
        payload.unpack(torch.zeros(4, 2, 7))


def test_the_state_crosses_between_the_first_and_the_last_recurrent_block() -> None:
    alone, beside = (4, 1, 7), (4, 1, 12)
    assert _shapes("MRARMM", STATE, _config()) == [alone, beside, beside, alone, alone]
    assert _shapes("MRARMM", HybridFields(), _config()) == [alone] * 5
    assert _shapes("MRAMMM", STATE, _config()) == [alone] * 5
    assert not declared("MRAM", STATE)


def test_virtual_stages_send_one_shape() -> None:
    """The schedule receives one shape everywhere; 4 tokens of 5 numbers take 3 rows of 7."""
    for stages in (2, 4):
        config = _config(stages, 3)
        assert _shapes("MRARMM", STATE, config) == [(7, 1, 7)] * 5
        assert _shapes("MRAMMM", STATE, config) == [(4, 1, 7)] * 5
        assert payload_at(1, "MRARMM", STATE, config) == StagePayload(7, (), 5)
        assert not sends_shapes("MRARMM", STATE, config)
    assert sends_shapes("MRARMM", STATE, _config(2))
    assert not sends_shapes("MRARMM", STATE, _config(1))


def test_the_schedule_divides_what_it_is_told() -> None:
    """24 tokens on CP=3 and, under SP, TP=2: 4 on a rank, and 3 rows behind them."""
    config = _config(4, 3)
    assert schedule_seq_length("MRARMM", STATE, config, 24) == 7 * 3 * 2
    config.sequence_parallel = False
    assert schedule_seq_length("MRARMM", STATE, config, 24) == (8 + 6) * 3
    assert schedule_seq_length("MRAMMM", STATE, config, 24) == 24
    assert schedule_seq_length("MRARMM", STATE, _config(4), 24) == 24


AGAIN = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def _stages_in_turn(text: str, **changes: Any) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Run the stages of a layout one after another in this process, and back.

    Returns:
        The output and every parameter's gradient, by its name in the whole model; and the shapes of
        what crossed the cuts.
    """
    layout = ParallelLayout.parse(text)
    model = tiny_model("MRARMRAM", **changes)
    spec, pp = StepSpec(model, dtype="float64"), layout.pp
    chunks: list[Any] = [None] * layout.chunks_count
    for rank in range(pp):
        with fake_rank(layout, rank):
            config = make_config(spec, layout)
            chunks[rank::pp] = build_chunks(config, layout)
            shapes = pp > 1 and not layout.vpp and "m2rnn_depth_state" in changes
            assert config.variable_seq_lengths == shapes
    parameters: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(chunk.decoder.layer_range[int(parts[2])])
            parameters[".".join(parts)] = parameter
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(parameters.items()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.3 * noise
    tokens = (torch.arange(32) % 118).view(2, 16)
    sent: list[torch.Tensor] = []
    received: list[torch.Tensor] = []
    for index, chunk in enumerate(chunks):
        with fake_rank(layout, index % pp):
            if sent:
                received.append(sent[-1].detach().requires_grad_())
                chunk.set_input_tensor(received[-1])
            sent.append(chunk(tokens, torch.arange(16).expand(2, -1), None))
    gradient = torch.randn(sent[-1].shape, generator=generator, dtype=torch.float64)
    for index in reversed(range(len(chunks))):
        with fake_rank(layout, index % pp):  # for what is recomputed
            sent[index].backward(gradient)
        if index:
            gradient = received[index - 1].grad
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    return {"output": sent[-1].detach(), **gradients}, [tuple(t.shape) for t in sent[:-1]]


@pytest.mark.parametrize("again", [{}, AGAIN])
@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("pp=4", [(16, 2, 52), (16, 2, 52), (16, 2, 48)]),
        ("pp=2,vpp=2", [(18, 2, 48)] * 3),
        ("pp=4,vpp=2", [(18, 2, 48)] * 7),
    ],
)
def test_stages_compute_what_one_computes(
    text: str, shapes: list[Any], again: dict[str, Any]
) -> None:
    """Bit for bit, output and gradients: the state crosses, and its gradient comes back."""
    whole, _ = _stages_in_turn("pp=1", m2rnn_depth_state=True)
    found, crossed = _stages_in_turn(text, m2rnn_depth_state=True, **again)
    assert crossed == shapes
    assert [name for name in whole if not torch.equal(whole[name], found[name])] == []
    gates = [whole[name].any().item() for name in sorted(whole) if "depth_gate" in name]
    assert gates == [False, True, True]  # the first R block takes zero


_NAME = "hybrid_stack_spec(m2rnn_depth_state=true,m2rnn_value_head_dim=4)"


def _plain(pattern: str, layout: ParallelLayout) -> TransformerConfig:
    meant = make_config(StepSpec(tiny_model(pattern)), layout)
    return TransformerConfig(
        **{field.name: getattr(meant, field.name) for field in fields(TransformerConfig)}
    )


def test_a_plain_configuration_is_refused_with_virtual_stages() -> None:
    """Megatron's scripts call the schedule with the tokens of a row."""
    layout = ParallelLayout.parse("pp=2,vpp=2")
    config, fields = _plain("RARA", layout), read_spec_name(_NAME)
    with (
        fake_rank(layout, 0),
        pytest.raises(UserError, match="m2rnn_depth_state crosses the cuts of virtual pipeline"),
    ):
        stack = build_hybrid_stack_spec(fields, vp_stage=0, pattern="RARA")
        CoreModel(
            config,
            **model_arguments(stack, HybridPattern.parse("RARA"), 4),
            vocab_size=118,
            max_sequence_length=16,
            post_process=False,
            **stage_argument(0),
        )


def test_a_plain_configuration_gets_the_payload_too() -> None:
    """What Megatron's scripts build: the option comes in the name of the spec."""
    layout = ParallelLayout.parse("pp=2")
    config = _plain("RARA", layout)
    with fake_rank(layout, 0):
        stack = build_hybrid_stack_spec(read_spec_name(_NAME), pattern="RARA")
        model = CoreModel(
            config,
            **model_arguments(stack, HybridPattern.parse("RARA"), 2),
            vocab_size=118,
            max_sequence_length=16,
            post_process=False,
        )
        tokens = torch.arange(32).view(2, 16)
        sent = model(tokens, torch.arange(16).expand(2, -1), None)
    assert sent.shape == (16, 2, 48 + 4) and config.variable_seq_lengths


def test_without_the_option_nothing_else_crosses() -> None:
    _, crossed = _stages_in_turn("pp=4")
    assert crossed == [(16, 2, 48)] * 3
