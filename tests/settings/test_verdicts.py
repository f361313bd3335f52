"""The tables of settings: complete, and what they cite exists."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from nemo_megacpp import cli
from nemo_megacpp.core.releases import imported, series_of
from nemo_megacpp.proof.covering import SETTINGS
from nemo_megacpp.settings.release_verdicts import (
    DDP_SINCE_0_17,
    DDP_UNTIL_0_16,
    OPTIMIZER_SINCE_0_17,
    OPTIMIZER_UNTIL_0_16,
    SINCE_0_17,
    UNTIL_0_16,
)
from nemo_megacpp.settings.validate import ALL_RELEASES, TABLES, default_of
from nemo_megacpp.settings.verdict_document import markdown, settings_document

ROOT = Path(__file__).parents[2]
PROOFS = sorted(
    {proof for table in TABLES.values() for setting in table.values() for proof in setting.proofs}
)


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.__name__)
def test_every_field_has_a_verdict(kind: type) -> None:
    """A field that Megatron-Core gains has to be judged; one that it loses goes."""
    assert set(TABLES[kind]) == {field.name for field in dataclasses.fields(kind)}


OF_RELEASES = {
    TransformerConfig: (UNTIL_0_16, SINCE_0_17),
    DistributedDataParallelConfig: (DDP_UNTIL_0_16, DDP_SINCE_0_17),
    OptimizerConfig: (OPTIMIZER_UNTIL_0_16, OPTIMIZER_SINCE_0_17),
}


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.__name__)
def test_what_another_release_has_is_declared(kind: type) -> None:
    """No verdict is left over: one that is not this release's is on the list of the others."""
    fields = {field.name for field in dataclasses.fields(kind)}
    until, since = OF_RELEASES[kind]
    foreign = since if series_of(imported()) == "0.16" else until
    assert set(ALL_RELEASES[kind]) - fields == set(foreign)


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.__name__)
def test_defaults_are_accepted(kind: type) -> None:
    """Megatron's own, but for the norm: a hybrid model's is RMSNorm."""
    for field in dataclasses.fields(kind):
        default = default_of(field)
        accepted = TABLES[kind][field.name].accepts(default, default)
        assert accepted is (field.name != "normalization"), field.name


@pytest.mark.parametrize("proof", [proof for proof in PROOFS if proof.startswith("tests/")])
def test_a_cited_test_exists(proof: str) -> None:
    path, _, name = proof.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def _covered_fields() -> set[str]:
    """Return the fields of Megatron's configurations that the list varies, ``Class.field``."""
    covered = set()
    for setting in SETTINGS:
        covered |= {f"TransformerConfig.{name}" for name in setting.model}
        covered |= {f"DistributedDataParallelConfig.{name}" for name in setting.ddp}
        covered |= {f"OptimizerConfig.{name}" for name in setting.optimizer}
        if "use_distributed_optimizer" in setting.spec:
            covered.add("DistributedDataParallelConfig.use_distributed_optimizer")
    return covered


def test_cited_settings_are_varied() -> None:
    cited = {proof.removeprefix("covering:") for proof in PROOFS if proof.startswith("covering:")}
    assert cited <= _covered_fields(), f"not varied: {sorted(cited - _covered_fields())}"


def test_a_proof_is_one_of_the_two_kinds() -> None:
    for proof in PROOFS:
        assert re.fullmatch(r"covering:\w+\.\w+|tests/[\w/]+\.py::test_\w+", proof), proof


def test_reasons_are_sentences() -> None:
    for table in TABLES.values():
        for name, setting in table.items():
            for text in filter(None, (setting.reason, setting.otherwise)):
                assert text[0].isupper() or text[0] == "'" or "." in text.split()[0], (name, text)
                assert not text.endswith((".", ";")), (name, text)


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = cli.read_arguments(["settings", "OptimizerConfig.bf16", "--json"])
    assert args.run(args) == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["settings"]
    assert (document["schema"], row["field"], row["verdict"]) == (1, "bf16", "proved")
    args = cli.read_arguments(["settings", "bf16"])
    monkeypatch.setenv("COLUMNS", "200")
    assert args.run(args) == 0
    shown = capsys.readouterr().out
    assert "TransformerConfig (1 proved" in shown and "OptimizerConfig (1 proved" in shown
    args = cli.read_arguments(["settings", "clip_gard"])
    with pytest.raises(ValueError, match=r"no setting 'clip_gard'\. Did you mean 'clip_grad'"):
        args.run(args)


def test_legal_values_are_shown_with_the_default() -> None:
    rows = {(row["configuration"], row["field"]): row for row in settings_document()["settings"]}
    assert rows["OptimizerConfig", "fp8_recipe"]["legal"] == ["'delayed'", "None"]
    assert rows["TransformerConfig", "fp16"]["legal"] == ["False"]
    assert rows["TransformerConfig", "hidden_size"]["legal"] is None


def test_the_page_has_every_setting() -> None:
    scope: dict = {}
    exec((ROOT / "docs" / "hooks.py").read_text(encoding="utf-8"), scope)
    page = scope["on_page_markdown"]((ROOT / "docs" / "settings.md").read_text(encoding="utf-8"))
    assert page.count("\n| `") == sum(map(len, TABLES.values()))
    assert markdown() in page
    assert scope["on_page_markdown"]("# Another page") == "# Another page"
