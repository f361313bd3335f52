"""``checkpoint export --to hf``: transformers computes what Megatron computes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_megacpp.checkpoint.identity import read_identity, write_identity
from nemo_megacpp.checkpoint.manifest import write_manifest
from nemo_megacpp.data.tokenizer import fingerprint, save_tokenizer, train_tokenizer
from nemo_megacpp.hf.export import export_hf
from tests.hf.cases import CASES
from tests.hf.command import command
from tests.hf.float64 import Float64
from tests.hf.models import LOGITS

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    return model.eval()


@pytest.fixture(scope="module")
def exported(
    saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return the export of a case."""
    root = tmp_path_factory.mktemp("exported")
    made: dict[str, Path] = {}

    def export(name: str) -> Path:
        if name not in made:
            made[name] = root / str(len(made))
            export_hf(saved(name), made[name])
        return made[name]

    return export


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits(name: str, saved: Callable[[str], Path], exported: Callable[[str], Path]) -> None:
    tokens, wanted = torch.load(saved(name).parent / LOGITS)
    model = load(exported(name))
    with Float64():
        logits = model(tokens).logits
    assert logits.dtype == torch.float64 and logits.shape == wanted.shape
    torch.testing.assert_close(logits, wanted, **EXACT)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_steps(name: str, saved: Callable[[str], Path], exported: Callable[[str], Path]) -> None:
    """A prompt, tokens one by one and several at once, with padding on the left of a row, equal one
    pass."""
    tokens, _ = torch.load(saved(name).parent / LOGITS)
    model, padding = load(exported(name)), 5
    with Float64():
        _compare_steps(model, tokens, padding)


def _compare_steps(model: Any, tokens: torch.Tensor, padding: int) -> None:
    wanted = model(tokens).logits
    tokens = torch.cat([tokens, tokens[:1].roll(padding, 1)])
    mask = torch.ones_like(tokens)
    mask[-1, :padding] = 0
    cache, found, done = None, [], 0
    for size in (9, 1, 1, 30, *[1] * 3):
        output = model(
            tokens[:, done : done + size],
            attention_mask=mask[:, : done + size],
            past_key_values=cache,
            use_cache=True,
        )
        cache, done = output.past_key_values, done + size
        found.append(output.logits)
    logits = torch.cat(found, dim=1)
    torch.testing.assert_close(logits[:-1], wanted[:, :done], **EXACT)
    torch.testing.assert_close(logits[-1, padding:], wanted[0, : done - padding], **EXACT)
    assert cache.get_seq_length() == done


def test_generate(saved: Callable[[str], Path], exported: Callable[[str], Path]) -> None:
    """The tokens of Megatron's own greedy choice, prompts of two lengths in one batch."""
    tokens, wanted = torch.load(saved("all").parent / LOGITS)
    model, new, short = load(exported("all")), 8, 11
    words = model.config.source["identity"]["model"]["vocab_size"]
    prompts = tokens[:, :short].clone()
    prompts[1] = prompts[1].roll(3)
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    made = model.generate(prompts, attention_mask=mask, max_new_tokens=new, do_sample=False)
    assert made.shape == (2, short + new) and made.max() < words, "no token of the padding"
    with torch.no_grad():
        for row, skip in ((made[0], 0), (made[1], 3)):
            logits = model(row[None, skip:]).logits[0, :, :words]
            chosen = logits[short - skip - 1 : -1].argmax(-1)
            assert torch.equal(chosen, row[short:])
    first = wanted[0, short - 1, :words].argmax()
    assert made[0, short] == first


@pytest.mark.parametrize("beams", [1, 3])
def test_the_cache_changes_no_token(
    beams: int, saved: Callable[[str], Path], exported: Callable[[str], Path]
) -> None:
    """In beam search, too, which reorders the states of the rows."""
    tokens, _ = torch.load(saved("all").parent / LOGITS)
    model, options = load(exported("all")), {"max_new_tokens": 5, "num_beams": beams}
    with Float64():
        made = [
            model.generate(tokens[:, :7], do_sample=False, use_cache=kept, **options)
            for kept in (True, False)
        ]
    assert torch.equal(*made) and made[0].shape == (2, 12)


def test_other_dtypes(exported: Callable[[str], Path]) -> None:
    """Decays, step sizes, skips and the expert bias stay float32 in bfloat16."""
    model = load(exported("all"), torch.bfloat16)
    wide = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "D", "dt_bias", "expert_bias"}
    with torch.no_grad():
        assert model(torch.arange(7)[None]).logits.dtype == torch.bfloat16


def _identity(folder: Path, tokenizer: str | None = None, **model: Any) -> None:
    identity = read_identity(folder)
    assert identity is not None
    changed = {"model": {**identity["model"], **model}, "tokenizer": tokenizer}
    write_identity(folder, {**identity, **changed}, 3)
    write_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_expert_capacity_factor": 1.5}, "moe_expert_capacity_factor=1.5: a token is dropped"),
        ({"activation_func": "mish"}, "activation_func=mish: an export has silu, gelu, relu2"),
        ({"family_modules": ["x.py"]}, "family_modules=.*no code of a user's family"),
        (
            {"vocab_size": 4096},
            "is damaged: it has a vocab_size of 4096 and",
        ),
        ({"hidden_size": 96}, r"hidden_size of 96, and the embedding has the shape \(96, 48\)"),
        ({"vocab_size": "90"}, "is damaged: model: vocab_size"),
        ({"m2rnn_depth_state": True}, "does not hold its model's tensors: it lacks decoder.layers"),
    ],
)
def test_what_is_not_expressed_is_refused(
    change: dict[str, Any],
    message: str,
    saved: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By its name, with exit code 2, and nothing is written."""
    own = Path(shutil.copytree(saved("all"), tmp_path / "own"))
    _identity(own, **change)
    out = tmp_path / "out"
    assert command("export", own, "--to", "hf", out) == 2
    told = capsys.readouterr()
    assert re.search(message, told.err) and "Traceback" not in told.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_the_commands(
    saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Export with a tokenizer and in another dtype; the options that do not go together."""
    texts = ["some words and more words"] * 3
    save_tokenizer(train_tokenizer(texts, 258), tmp_path / "data" / "tokenizer")
    own = saved("M")
    out = tmp_path / "out"
    data = tmp_path / "data"
    assert command("export", saved("all"), "--to", "hf", out, "--tokenizer", data) == 2
    assert "has 258 tokens, and the model 90" in capsys.readouterr().err
    assert command("export", own, out, "--dtype", "float32") == 2
    assert "--tokenizer and --no-tokenizer go with --to hf" in capsys.readouterr().err
    assert command("export", own, "--to", "hf", out, "--dtype", "float8") == 2
    assert "--dtype float8: the choices are float32" in capsys.readouterr().err
    assert not out.exists()
    assert (
        command(*("export", own, "--to", "hf", out, "--tokenizer", data, "--dtype", "bfloat16"))
        == 0
    )
    assert "tensors" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("some words")["input_ids"]
    assert ids and tokenizer.decode(ids) == "some words"
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, 1)


def test_the_tokenizer_is_found(
    saved: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the data that the run names, then in a built-in corpus; by its fingerprint. Without it
    nothing is written, unless that is asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = Path(shutil.copytree(saved("M"), tmp_path / "run" / "checkpoints" / "step=3"))
    texts = ["some words and more words"] * 3
    data, builtin = tmp_path / "data", tmp_path / "cache/nemo_megacpp/torch-9-headers-258"
    for text, folder in (("words", tmp_path / "other"), ("more", data), ("corpus", builtin)):
        save_tokenizer(train_tokenizer([*texts, text], 258), folder / "tokenizer")
        file = folder / "tokenizer" / "tokenizer.json"
        file.write_text(file.read_text().replace('"<|padding|>"', f'"<|{text}|>"'))
    record = tmp_path / "run" / "record" / "recipe.yaml"
    record.parent.mkdir()
    record.write_text(f"data: [{tmp_path / 'other'}, {data}]")

    for number, folder in enumerate((data, builtin)):
        _identity(own, fingerprint(folder / "tokenizer"))
        out = tmp_path / f"{number}"
        assert command("export", own, "--to", "hf", out) == 0
        assert "the tokenizer has 258 tokens" in capsys.readouterr().out
        assert fingerprint(out) == fingerprint(folder / "tokenizer")

    _identity(own, "0" * 64)
    assert command("export", own, "--to", "hf", tmp_path / "none") == 2
    told = capsys.readouterr().err
    assert "(000000000000) is neither in the data that its run names nor" in told
    assert "give --tokenizer DIR" in told and "Or --no-tokenizer exports" in told
    assert str(data / "tokenizer") in told and str(builtin / "tokenizer") in told
    assert not (tmp_path / "none").exists()
    assert command("export", own, "--to", "hf", tmp_path / "none", "--no-tokenizer") == 0
    assert not (tmp_path / "none" / "tokenizer.json").exists()
    both = ("--no-tokenizer", "--tokenizer", data)
    assert command("export", own, "--to", "hf", tmp_path / "both", *both) == 2
    assert "do not go together" in capsys.readouterr().err


def test_fields_are_those_of_the_configuration(exported: Callable[[str], Path]) -> None:
    """No field is written that the modelling code does not read, and the other way round."""
    config = json.loads((exported("all") / "config.json").read_text())
    known = load(exported("MIMO")).config
    defaults = sys.modules[type(known).__module__].DEFAULTS
    beside = {"architectures", "model_type", "auto_map", "torch_dtype", "tie_word_embeddings"}
    of_mamba3 = {"mamba3_num_angles", "mamba3_pairs"}
    assert set(config) - beside == set(defaults) - {"use_cache"} - of_mamba3
