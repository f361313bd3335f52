"""The settings of our mixers: declared once, validated, and passed to the mixers by their specs."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

import pytest
from megatron.core.transformer import TransformerConfig

from nemo_megacpp.config import HybridConfig, config_violations
from nemo_megacpp.errors import UserError
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.mixer_settings import M2RNNSettings, Mamba3Settings, MixerSettings
from nemo_megacpp.mixers.m2rnn_mixer import M2RNNMixer
from nemo_megacpp.mixers.mamba3_mixer import Mamba3Mixer
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.proof.small_models import tiny_model
from nemo_megacpp.specs.backend import TorchBackend
from nemo_megacpp.specs.stack_spec import build_hybrid_stack_spec

KINDS = (M2RNNSettings, Mamba3Settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_declares_the_same_fields(kind: type[MixerSettings]) -> None:
    """Every name, type and default, and no other field of that prefix."""
    hints, declared = typing.get_type_hints(kind), typing.get_type_hints(HybridFields)
    mine = {kind.prefix + field.name: field for field in dataclasses.fields(kind)}
    fields = {f.name: f for f in dataclasses.fields(HybridFields) if f.name.startswith(kind.prefix)}
    assert fields.keys() == mine.keys()
    for name, field in mine.items():
        assert fields[name].default == field.default, name
        assert declared[name] == hints[field.name], name


def test_specs_carry_the_settings_of_a_configuration() -> None:
    changes = {"m2rnn_key_head_dim": 8, "mamba3_output_norm": True, "m2rnn_num_heads": 4}
    config = HybridConfig(**tiny_model("MR", mode="mamba3", **changes))
    layers = build_hybrid_stack_spec(config, TorchBackend()).submodules.layers
    mamba, recurrent = (layers[letter].submodules.mixer for letter in "MR")
    assert (mamba.module, recurrent.module) == (Mamba3Mixer, M2RNNMixer)
    assert mamba.params == {"settings": Mamba3Settings.of(config)}
    assert recurrent.params == {"settings": M2RNNSettings.of(config)}
    assert mamba.params["settings"].output_norm
    found = recurrent.params["settings"]
    assert (found.key_head_dim, found.heads(config.hidden_size)) == (8, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"m2rnn_num_heads": 0}, "m2rnn_num_heads=0 must be at least 1"),
        ({"m2rnn_conv_kernel": 0}, "m2rnn_conv_kernel=0 must be at least 1"),
        ({"m2rnn_state_gradient_clip": 0.0}, "m2rnn_state_gradient_clip=0.0 must be above 0"),
        ({"m2rnn_state_gradient_clip": math.nan}, "clip=nan must be above 0, or null"),
        ({"mode": "mamba3", "mamba3_mimo_rank": 0}, "mamba3_mimo_rank=0 must be at least 1"),
    ],
)
def test_illegal_settings_are_refused_with_the_spec(fields: Any, message: str) -> None:
    """A script's ``--spec`` has no configuration that would be validated before."""
    with pytest.raises(UserError, match=message):
        build_hybrid_stack_spec(HybridFields(**fields), TorchBackend())


@pytest.mark.parametrize("pattern", ["R", "A"])
def test_a_configuration_refuses_them_in_any_pattern(pattern: str) -> None:
    with pytest.raises(UserError, match="m2rnn_key_head_dim=0 must be at least 1"):
        HybridConfig(**tiny_model(pattern, m2rnn_key_head_dim=0))


def test_heads_fill_the_hidden_size_by_default() -> None:
    assert M2RNNSettings().heads(64) == 4
    with pytest.raises(UserError, match=r"hidden_size=100 .* m2rnn_value_head_dim=16.*num_heads"):
        M2RNNSettings().heads(100)


def test_a_scripts_mamba3_has_no_biases_either() -> None:
    """Its configuration does not hold the mode; the spec's fields do."""
    plain = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, normalization="RMSNorm"
    )
    assert plain.add_bias_linear, "Megatron's default"
    for mode, refused in (("nemo_native", False), ("mamba3", True)):
        found = config_violations(plain, HybridPattern.parse("AM"), HybridFields(mode=mode))
        assert any("the projections of M have no biases" in text for text in found) is refused
