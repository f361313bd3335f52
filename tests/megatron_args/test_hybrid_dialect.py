"""The arguments of ``pretrain_hybrid.py``: the pattern twice, in Megatron's symbols and in ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_megacpp.cli import build_parser
from nemo_megacpp.core.multi_token import missing_prediction
from nemo_megacpp.errors import UserError
from nemo_megacpp.megatron_args.argument_list import megatron_arguments
from nemo_megacpp.megatron_args.dialect import choose
from nemo_megacpp.pattern import HybridPattern
from nemo_megacpp.recipes.catalog import CATALOG
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.specs.named import read_spec_name

DIALECT, _ = choose("core_v0.19.0")
NAMES = {
    name for option, entry in DIALECT.options.items() for name in (option, *entry.get("also", []))
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory and cache: no built-in corpus, nothing to write over."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def _words(name: str, *overrides: str) -> list[str]:
    words, _ = megatron_arguments(
        resolve(name, ("tensorboard=false", *overrides)), DIALECT, "there", "cpu"
    )
    return words


def _patterns(words: list[str]) -> tuple[str, str]:
    """Return Megatron's pattern, and the one in the spec's name."""
    option = "--hybrid-layer-pattern"
    joined = [word.removeprefix(f"{option}=") for word in words if word.startswith(f"{option}=")]
    theirs = joined[0] if joined else words[words.index(option) + 1]
    return theirs, read_spec_name(words[words.index("--spec") + 2]).hybrid_pattern


@pytest.mark.parametrize("name", CATALOG)
def test_every_option_exists(name: str) -> None:
    options = [word.partition("=")[0] for word in _words(name) if word.startswith("--")]
    assert set(options) <= NAMES
    theirs, ours = _patterns(_words(name, "pp=1", "ep=1", "tp=1"))
    assert ours == resolve(name).pattern.letters
    assert HybridPattern.from_megatron(theirs, "hybrid_layer_pattern").letters == ours.replace(
        "R", "M"
    )


@pytest.mark.parametrize(
    ("pattern", "settings", "theirs", "ours"),
    [
        ("AEMAEMMR", ("pp=1",), "*EM*EMMM", "AEMAEMMR"),
        ("AEMAEMMR", ("pp=2",), "*EM*|EMMM", "AEMA|EMMR"),
        ("AEMAEMMR", ("pp=2", "vpp=2"), "*E|M*|EM|MM", "AE|MA|EM|MR"),
        ("AEM|AEMMR", ("pp=2",), "*EM|*EMMM", "AEM|AEMMR"),
        # A cut that the layout does not use would become a virtual stage there.
        ("AEM|AEMMR", ("pp=1",), "*EM*EMMM", "AEMAEMMR"),
    ],
)
def test_the_cuts_are_those_of_the_layout(
    pattern: str, settings: tuple[str, ...], theirs: str, ours: str
) -> None:
    base = (f"pattern={pattern}", "num_layers=8", "tp=1", "global_batch_size=8")
    found = _words("nam56r_tiny", *base, "moe_router_load_balancing_type=none", *settings)
    assert _patterns(found) == (theirs, ours)


def test_a_pattern_that_starts_with_an_mlp() -> None:
    words = _words("nam56r_tiny", "pattern=FAFR", "num_layers=4", "ffn_hidden_size=80")
    assert "--hybrid-layer-pattern=-*-M" in words
    assert _patterns(words)[1] == "FAFR"


@pytest.mark.skipif(missing_prediction() is not None, reason=str(missing_prediction()))
def test_prediction_depths() -> None:
    """They come after the cuts of both patterns, with their number and the weight of their loss."""
    settings = ("pattern=AMRE/RF/RF", "num_layers=4", "ffn_hidden_size=80", "tp=1", "pp=2")
    settings += ("moe_router_load_balancing_type=none", "mtp_loss_scaling_factor=0.3")
    words = _words("nam56r_tiny", *settings, "global_batch_size=8")
    assert _patterns(words) == ("*M|ME/M-/M-", "AM|RE/RF/RF")
    for option, value in (("--mtp-num-layers", "2"), ("--mtp-loss-scaling-factor", "0.3")):
        assert words[words.index(option) + 1] == value
    with pytest.raises(UserError, match="prediction depths with context_parallel_size=2"):
        _words("nam56r_tiny", *settings, "global_batch_size=8", "cp=2")


def test_a_spec_name_carries_a_pattern() -> None:
    fields = read_spec_name("hybrid_mamba3_stack_spec(hybrid_pattern=AE|M*,m2rnn_num_heads=2)")
    assert (fields.hybrid_pattern, fields.m2rnn_num_heads) == ("AE|MA", 2)
    with pytest.raises(UserError, match="hybrid_pattern: 'X' is not a letter"):
        read_spec_name("hybrid_stack_spec(hybrid_pattern=AEX)")


def test_the_command_says_what_validated_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--device=cpu", "--megatron=core_v0.19.0", "--json")
    args = build_parser().parse_args(
        ["megatron-args", "nam56r_tiny", "tensorboard=false", *options]
    )
    assert args.run(args) == 0
    out, remarks = capsys.readouterr()
    told = json.loads(out)
    assert (told["script"], told["megatron"]) == ("pretrain_hybrid.py", "core_v0.19.0")
    assert "the script's TFLOP/s count R blocks as M" in remarks
    other = choose(None)[0] is not DIALECT
    assert ("was validated with the installed Megatron-Core" in remarks) is other
